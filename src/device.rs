//! Devices by their names on the command line.

use std::fmt;
use std::str::FromStr;

/// A device to compute on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Device {
    #[default]
    Cpu,
    /// A GPU by its number.
    Cuda(usize),
}

/// Devices for a process that can serve several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    One(Device),
    /// Every GPU of this machine.
    AllCuda,
    /// Every usable GPU, or the CPU when there is none.
    Auto,
}

impl Default for Devices {
    fn default() -> Self {
        Devices::One(Device::default())
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

impl fmt::Display for Devices {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Devices::One(device) => device.fmt(f),
            Devices::AllCuda => f.write_str("cuda:all"),
            Devices::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match (name, name.strip_prefix("cuda:").map(str::parse)) {
            ("cpu", _) => Ok(Device::Cpu),
            (_, Some(Ok(number))) => Ok(Device::Cuda(number)),
            _ => Err("it must be cpu or cuda:N, such as cuda:0".into()),
        }
    }
}

impl FromStr for Devices {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "cuda:all" => Ok(Devices::AllCuda),
            "auto" => Ok(Devices::Auto),
            _ => match name.parse() {
                Ok(device) => Ok(Devices::One(device)),
                Err(_) => Err("it must be cpu, cuda:N such as cuda:0, cuda:all or auto".into()),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_they_are_printed() {
        for name in ["cpu", "cuda:0", "cuda:17"] {
            assert_eq!(name.parse::<Device>().unwrap().to_string(), name);
            assert_eq!(name.parse::<Devices>().unwrap(), Devices::One(name.parse().unwrap()));
        }
        for name in ["cuda:all", "auto"] {
            assert_eq!(name.parse::<Devices>().unwrap().to_string(), name);
            assert!(name.parse::<Device>().is_err(), "{name}");
        }
        for name in ["", "gpu", "cuda", "cuda:", "cuda:-1", "cuda:x", "CPU"] {
            assert!(name.parse::<Device>().is_err() && name.parse::<Devices>().is_err(), "{name}");
        }
    }
}
