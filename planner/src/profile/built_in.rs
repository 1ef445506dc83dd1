//! Profiles that come with the planner, as `outboard profile` measured them.
//!
//! | name | measured on |
//! |---|---|
//! | `cpu` | a shared two-core machine with AVX2 (AMD Zen 3), both cores in use by others at times |
//! | `h200` | an NVIDIA H200 with cuDNN 9.19, head dim 128. At 131072 keys batches were too small to fill the device; that column is left out, and 16384 keys hold beyond |
//! | `h100` | nothing: it is `h200`. NVIDIA's datasheets of the H100 and the H200 (SXM) name the same compute, 989 TFLOP/s of dense bf16; they differ in memory, which attention on tasks worth moving does not wait for |

use outboard_attention::{DType, Direction};

use super::{Grid, Profile};

/// Sizes that all of them were measured at.
const ROWS: [usize; 4] = [16, 128, 1024, 8192];
const KEYS: [usize; 3] = [128, 1024, 16384];

/// A grid over [`ROWS`] and [`KEYS`].
struct Measured {
    direction: Direction,
    dtype: DType,
    head_dim: usize,
    efficiency: [[f64; KEYS.len()]; ROWS.len()],
}

/// The profile of that name.
pub(super) fn profile(name: &str) -> Option<Profile> {
    let (peak, overhead, grids): (f64, f64, &[Measured]) = match name {
        "cpu" => (CPU_PEAK, CPU_OVERHEAD, &CPU),
        "h100" | "h200" => (HOPPER_PEAK, HOPPER_OVERHEAD, &HOPPER),
        _ => return None,
    };
    let grid = |measured: &Measured| Grid {
        direction: measured.direction,
        dtype: measured.dtype,
        head_dim: measured.head_dim,
        rows: ROWS.to_vec(),
        keys: KEYS.to_vec(),
        efficiency: measured.efficiency.iter().map(|row| row.to_vec()).collect(),
    };
    Profile::new(peak, overhead, grids.iter().map(grid).collect()).ok()
}

const CPU_PEAK: f64 = 2.04394e11;
const CPU_OVERHEAD: f64 = 3.26916e-6;
const CPU: [Measured; 8] = [
    Measured {
        direction: Direction::Forward,
        dtype: DType::F32,
        head_dim: 64,
        efficiency: [
            [0.90784, 0.53618, 0.50186],
            [0.72776, 0.74667, 0.75338],
            [0.70477, 0.78143, 0.80556],
            [0.68724, 0.80795, 0.82517],
        ],
    },
    Measured {
        direction: Direction::Backward,
        dtype: DType::F32,
        head_dim: 64,
        efficiency: [
            [0.66787, 0.5626, 0.42559],
            [0.73825, 0.79034, 0.79739],
            [0.73608, 0.81482, 0.83591],
            [0.7329, 0.83556, 0.84818],
        ],
    },
    Measured {
        direction: Direction::Forward,
        dtype: DType::F32,
        head_dim: 128,
        efficiency: [
            [0.82677, 0.61239, 0.58475],
            [0.7618, 0.80754, 0.81554],
            [0.73931, 0.81846, 0.84447],
            [0.72202, 0.84442, 0.86709],
        ],
    },
    Measured {
        direction: Direction::Backward,
        dtype: DType::F32,
        head_dim: 128,
        efficiency: [
            [0.57844, 0.56957, 0.38405],
            [0.75552, 0.81925, 0.81513],
            [0.76958, 0.84319, 0.85618],
            [0.7573, 0.86063, 0.86622],
        ],
    },
    Measured {
        direction: Direction::Forward,
        dtype: DType::Bf16,
        head_dim: 64,
        efficiency: [
            [0.82993, 0.49099, 0.46317],
            [0.73255, 0.74896, 0.75288],
            [0.70393, 0.79254, 0.81086],
            [0.69832, 0.80597, 0.82587],
        ],
    },
    Measured {
        direction: Direction::Backward,
        dtype: DType::Bf16,
        head_dim: 64,
        efficiency: [
            [0.57742, 0.50857, 0.41454],
            [0.73089, 0.78322, 0.79025],
            [0.74301, 0.81788, 0.84181],
            [0.74062, 0.83633, 0.84698],
        ],
    },
    Measured {
        direction: Direction::Forward,
        dtype: DType::Bf16,
        head_dim: 128,
        efficiency: [
            [0.75039, 0.56456, 0.54648],
            [0.75763, 0.80393, 0.81358],
            [0.74774, 0.84612, 0.85529],
            [0.75007, 0.85484, 0.87478],
        ],
    },
    Measured {
        direction: Direction::Backward,
        dtype: DType::Bf16,
        head_dim: 128,
        efficiency: [
            [0.53429, 0.53985, 0.37398],
            [0.75656, 0.81771, 0.80301],
            [0.77346, 0.86349, 0.8682],
            [0.78207, 0.87032, 0.86522],
        ],
    },
];

const HOPPER_PEAK: f64 = 5.80469e14;
const HOPPER_OVERHEAD: f64 = 3.93875e-7;
const HOPPER: [Measured; 2] = [
    Measured {
        direction: Direction::Forward,
        dtype: DType::Bf16,
        head_dim: 128,
        efficiency: [
            [0.00759, 0.0293, 0.03243],
            [0.05932, 0.22797, 0.25724],
            [0.40117, 0.95676, 0.94016],
            [0.59641, 0.86311, 1.0],
        ],
    },
    Measured {
        direction: Direction::Backward,
        dtype: DType::Bf16,
        head_dim: 128,
        efficiency: [
            [0.00478, 0.01186, 0.01657],
            [0.03163, 0.0877, 0.12709],
            [0.10912, 0.36615, 0.56721],
            [0.14556, 0.5672, 0.86307],
        ],
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_has_a_sound_profile() {
        for name in Profile::BUILT_IN {
            assert!(profile(name).is_some(), "{name}");
        }
        assert_eq!(profile("H200"), None);
        assert_eq!(profile("h100"), profile("h200"));
    }
}
