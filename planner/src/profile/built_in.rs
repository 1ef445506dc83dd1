//! Profiles that come with the planner, as `outboard profile` measured them.
//!
//! | name | measured on |
//! |---|---|
//! | `cpu` | a shared two-core machine with AVX2 (AMD Zen 3), both cores in use by others at times |
//! | `h200` | an NVIDIA H200 with cuDNN 9.19, head dim 128; its peak is what the fastest size reached |
//! | `h100` | nothing: it is `h200`. public specifications of the SXM cards name the same chip, 132 processors and 989 TFLOP/s of dense bf16; they differ in memory, which attention on tasks worth moving does not wait for |

use outboard_attention::{DType, Direction};

use super::{Grid, Profile};

/// Sizes that they were measured at: the last one of keys on GPUs alone.
const ROWS: [usize; 4] = [16, 128, 1024, 8192];
const KEYS: [usize; 4] = [128, 1024, 16384, 131_072];

/// A grid over [`ROWS`] and the first `N` of [`KEYS`].
struct Measured<const N: usize> {
    direction: Direction,
    dtype: DType,
    head_dim: usize,
    efficiency: [[f64; N]; ROWS.len()],
}

/// The profile of that name.
pub(super) fn profile(name: &str) -> Option<Profile> {
    match name {
        "cpu" => of(CPU_PEAK, CPU_OVERHEAD, &CPU),
        "h100" | "h200" => of(HOPPER_PEAK, HOPPER_OVERHEAD, &HOPPER),
        _ => None,
    }
}

fn of<const N: usize>(peak: f64, overhead: f64, grids: &[Measured<N>]) -> Option<Profile> {
    let grid = |measured: &Measured<N>| Grid {
        direction: measured.direction,
        dtype: measured.dtype,
        head_dim: measured.head_dim,
        rows: ROWS.to_vec(),
        keys: KEYS.iter().copied().take(N).collect(),
        efficiency: measured.efficiency.iter().map(|row| row.to_vec()).collect(),
    };
    Profile::new(peak, overhead, grids.iter().map(grid).collect()).ok()
}

const CPU_PEAK: f64 = 2.04394e11;
const CPU_OVERHEAD: f64 = 3.26916e-6;
const CPU: [Measured<3>; 8] = [
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

const HOPPER_PEAK: f64 = 6.35310e14;
const HOPPER_OVERHEAD: f64 = 3.94437e-7;
const HOPPER: [Measured<4>; 2] = [
    Measured {
        direction: Direction::Forward,
        dtype: DType::Bf16,
        head_dim: 128,
        efficiency: [
            [0.00696, 0.02666, 0.02921, 0.02893],
            [0.05493, 0.21021, 0.23197, 0.23027],
            [0.36642, 0.87158, 0.95222, 0.85312],
            [0.54736, 0.93929, 1.0, 0.96937],
        ],
    },
    Measured {
        direction: Direction::Backward,
        dtype: DType::Bf16,
        head_dim: 128,
        efficiency: [
            [0.0044, 0.01086, 0.01495, 0.01556],
            [0.0289, 0.08019, 0.11544, 0.12233],
            [0.09984, 0.35305, 0.52845, 0.57149],
            [0.13619, 0.53886, 0.84166, 0.86932],
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
