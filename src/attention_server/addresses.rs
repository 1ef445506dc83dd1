//! Where several servers of one process listen.

use std::net::SocketAddr;

use anyhow::{Context, bail};

/// Where each of `servers` servers listens, and the address that it tells the coordinator if that is another one.
pub(super) fn of(
    listen: SocketAddr,
    advertise: Option<&str>,
    servers: usize,
) -> anyhow::Result<Vec<(SocketAddr, Option<String>)>> {
    if servers == 1 {
        return Ok(vec![(listen, advertise.map(str::to_owned))]);
    }
    let mut addresses = Vec::with_capacity(servers);
    for n in 0..servers {
        let own = match listen.port() {
            0 if advertise.is_some() => {
                bail!("--advertise needs a port in --listen where {servers} servers are started")
            }
            0 => listen,
            first => SocketAddr::new(listen.ip(), port(first, n, servers)?),
        };
        let advertised = advertise.map(|address| {
            let split = address.rsplit_once(':').and_then(|(host, first)| Some((host, first.parse().ok()?)));
            let (host, first) =
                split.with_context(|| format!("--advertise {address} must be given as host:port"))?;
            anyhow::Ok(format!("{host}:{}", port(first, n, servers)?))
        });
        addresses.push((own, advertised.transpose()?));
    }
    Ok(addresses)
}

fn port(first: u16, n: usize, servers: usize) -> anyhow::Result<u16> {
    let port = u16::try_from(n).ok().and_then(|n| first.checked_add(n));
    port.with_context(|| {
        format!("{servers} servers need the ports from {first} on, which end at {}", u16::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(listen: &str, advertise: Option<&str>, servers: usize, expected: &[(&str, Option<&str>)]) {
        let addresses = of(listen.parse().unwrap(), advertise, servers).unwrap();
        let expected: Vec<_> =
            expected.iter().map(|(own, told)| (own.parse().unwrap(), told.map(str::to_owned))).collect();
        assert_eq!(addresses, expected);
    }

    #[test]
    fn servers_listen_on_consecutive_ports_or_on_free_ones() {
        check("127.0.0.1:0", None, 2, &[("127.0.0.1:0", None), ("127.0.0.1:0", None)]);
        check("[::]:70", Some("h:90"), 2, &[("[::]:70", Some("h:90")), ("[::]:71", Some("h:91"))]);
        check("0.0.0.0:0", Some("anything"), 1, &[("0.0.0.0:0", Some("anything"))]);
    }

    #[test]
    fn ports_that_cannot_be_are_refused() {
        for (listen, advertise) in [("[::]:65535", None), ("[::]:0", Some("h:9")), ("[::]:7", Some("h"))] {
            assert!(of(listen.parse().unwrap(), advertise, 2).is_err(), "{listen} {advertise:?}");
        }
        assert!(of("[::]:7".parse().unwrap(), Some("h:65535"), 2).is_err());
    }
}
