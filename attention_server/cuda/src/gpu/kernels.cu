// Kernels that move data between tasks and sequences. The structures are those of tables.rs.
// A block is 32 lanes wide, which share a row, and 8 rows high.

typedef unsigned short u16;
typedef long long i64;

// The LSE of no keys.
#define NOTHING __int_as_float(0xff800000)

#if OUTBOARD_BF16
__device__ float widen(u16 x) { return __uint_as_float((unsigned)x << 16); }
__device__ u16 narrow(float x) {
  u16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#else
__device__ float widen(u16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}
__device__ u16 narrow(float x) {
  u16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}
#endif

struct Move { i64 source, target; int rows, stride, group, dim, padded, reversed; };
struct RowMove { i64 source, target; int rows, stride, group, reversed; };
struct MadeUp { i64 d, d_o, target; int rows, stride, group, padded, reversed, zero; };
struct RowHead { i64 values, lse; int rows, heads, first_head, group, dim, padded, first_piece, pieces; };
struct KeyHead { i64 dk, dv; int keys, heads, head, group, dim, v_dim, padded, first_piece, pieces, zero; };
struct PieceSpan { i64 place; int start, end, reversed, zero; };

#define FIRST_ROW ((i64)blockIdx.x * blockDim.y + threadIdx.y)
#define ROW_STEP ((i64)gridDim.x * blockDim.y)
#define EACH_ROW(row, rows) for (i64 row = FIRST_ROW; row < (rows); row += ROW_STEP)

extern "C" __global__ void move_heads(const u16* __restrict__ tensors, u16* __restrict__ work,
                                      const Move* __restrict__ moves) {
  const Move m = moves[blockIdx.y];
  const int width = m.group * m.padded;
  const bool wide = m.dim % 8 == 0;
  EACH_ROW(row, m.rows) {
    const u16* from = tensors + m.source + row * m.stride;
    u16* to = work + m.target + (m.reversed ? m.rows - 1 - row : row) * width;
    if (wide) {
      for (int i = threadIdx.x * 8; i < width; i += 256) {
        const int head = i / m.padded, e = i % m.padded;
        int4 x = make_int4(0, 0, 0, 0);
        if (e < m.dim) x = *(const int4*)(from + head * m.dim + e);
        *(int4*)(to + i) = x;
      }
    } else {
      for (int i = threadIdx.x; i < width; i += 32) {
        const int head = i / m.padded, e = i % m.padded;
        to[i] = e < m.dim ? from[head * m.dim + e] : 0;
      }
    }
  }
}

extern "C" __global__ void move_rows(const float* __restrict__ tensors, float* __restrict__ work,
                                     const RowMove* __restrict__ moves) {
  const RowMove m = moves[blockIdx.y];
  EACH_ROW(row, m.rows) {
    const i64 to = m.reversed ? m.rows - 1 - row : row;
    for (int g = threadIdx.x; g < m.group; g += 32)
      work[m.target + to * m.group + g] = tensors[m.source + row * m.stride + g];
  }
}

// O = dO * D / sum(dO^2), scaled by the largest |dO| so that no square over- or underflows.
extern "C" __global__ void make_up(const float* __restrict__ tensors, u16* __restrict__ work,
                                   const MadeUp* __restrict__ entries) {
  const MadeUp m = entries[blockIdx.y];
  EACH_ROW(row, m.rows) {
    const i64 token = m.reversed ? m.rows - 1 - row : row;
    for (int g = 0; g < m.group; ++g) {
      const u16* d_o = work + m.d_o + (row * m.group + g) * m.padded;
      u16* o = work + m.target + (row * m.group + g) * m.padded;
      float largest = 0;
      for (int e = threadIdx.x; e < m.padded; e += 32) largest = fmaxf(largest, fabsf(widen(d_o[e])));
      for (int s = 16; s; s /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, s));
      const float unit = largest > 0 ? 1 / largest : 0;
      float sum = 0;
      for (int e = threadIdx.x; e < m.padded; e += 32) {
        const float x = widen(d_o[e]) * unit;
        sum += x * x;
      }
      for (int s = 16; s; s /= 2) sum += __shfl_xor_sync(~0u, sum, s);
      const float d = tensors[m.d + token * m.stride + g];
      const float factor = sum > 0 ? d / sum * unit : 0;
      for (int e = threadIdx.x; e < m.padded; e += 32) o[e] = narrow(widen(d_o[e]) * unit * factor);
    }
  }
}

__device__ i64 row_in(const PieceSpan& piece, i64 row) {
  if (row < piece.start || row >= piece.end) return -1;
  return piece.place + (piece.reversed ? piece.end - 1 - row : row - piece.start);
}

// Outputs of pieces, merged by their LSE in the order of the pieces. A row of one piece is copied.
extern "C" __global__ void merge_outputs(const u16* __restrict__ o, const float* __restrict__ lse,
                                         float* __restrict__ out, const RowHead* __restrict__ heads,
                                         const PieceSpan* __restrict__ pieces) {
  const RowHead h = heads[blockIdx.y];
  EACH_ROW(row, h.rows) {
    for (int g = 0; g < h.group; ++g) {
      float max = NOTHING;
      int count = 0;
      for (int p = 0; p < h.pieces; ++p) {
        const i64 at = row_in(pieces[h.first_piece + p], row);
        if (at < 0) continue;
        max = fmaxf(max, lse[at * h.group + g]);
        ++count;
      }
      float total = 0;
      if (max == NOTHING) max = 0;
      for (int p = 0; p < h.pieces; ++p) {
        const i64 at = row_in(pieces[h.first_piece + p], row);
        if (at >= 0) total += expf(lse[at * h.group + g] - max);
      }
      const i64 place = row * h.heads + h.first_head + g;
      for (int e = threadIdx.x; e < h.dim; e += 32) {
        float sum = 0;
        for (int p = 0; p < h.pieces; ++p) {
          const i64 at = row_in(pieces[h.first_piece + p], row);
          if (at < 0) continue;
          const float x = widen(o[(at * h.group + g) * h.padded + e]);
          if (count == 1) {
            sum = x;
          } else {
            const float weight = expf(lse[at * h.group + g] - max);
            if (weight != 0) sum += weight * x;
          }
        }
        out[h.values + place * h.dim + e] = count > 1 && total > 0 ? sum / total : sum;
      }
      if (threadIdx.x == 0) {
        float merged = max + logf(total);
        if (count == 0) merged = NOTHING;
        if (count == 1) {
          for (int p = 0; p < h.pieces; ++p) {
            const i64 at = row_in(pieces[h.first_piece + p], row);
            if (at >= 0) merged = lse[at * h.group + g];
          }
        }
        out[h.lse + place] = merged;
      }
    }
  }
}

// dQ of pieces, summed in their order.
extern "C" __global__ void sum_rows(const u16* __restrict__ dq, float* __restrict__ out,
                                    const RowHead* __restrict__ heads, const PieceSpan* __restrict__ pieces) {
  const RowHead h = heads[blockIdx.y];
  EACH_ROW(row, h.rows) {
    for (int i = threadIdx.x; i < h.group * h.dim; i += 32) {
      const int g = i / h.dim, e = i % h.dim;
      float sum = 0;
      for (int p = 0; p < h.pieces; ++p) {
        const i64 at = row_in(pieces[h.first_piece + p], row);
        if (at >= 0) sum += widen(dq[(at * h.group + g) * h.padded + e]);
      }
      out[h.values + (row * h.heads + h.first_head) * h.dim + i] = sum;
    }
  }
}

__device__ float sum_key(const u16* __restrict__ gradient, const KeyHead& h, const PieceSpan* __restrict__ pieces,
                         i64 key, int e) {
  float sum = 0;
  for (int p = 0; p < h.pieces; ++p) {
    const i64 at = row_in(pieces[h.first_piece + p], key);
    if (at < 0) continue;
    for (int g = 0; g < h.group; ++g) sum += widen(gradient[(at * h.group + g) * h.padded + e]);
  }
  return sum;
}

// dK and dV of pieces and query heads, summed in that order.
extern "C" __global__ void sum_keys(const u16* __restrict__ dk, const u16* __restrict__ dv, float* __restrict__ out,
                                    const KeyHead* __restrict__ heads, const PieceSpan* __restrict__ pieces) {
  const KeyHead h = heads[blockIdx.y];
  EACH_ROW(key, h.keys) {
    const i64 place = key * h.heads + h.head;
    for (int e = threadIdx.x; e < h.dim; e += 32) out[h.dk + place * h.dim + e] = sum_key(dk, h, pieces, key, e);
    for (int e = threadIdx.x; e < h.v_dim; e += 32) out[h.dv + place * h.v_dim + e] = sum_key(dv, h, pieces, key, e);
  }
}
