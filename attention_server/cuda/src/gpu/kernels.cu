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
struct RowHead { i64 values, lse; int rows, heads, first_head, group, dim, padded, first_block, narrow; };
struct KeyHead { i64 dk, dv; int keys, heads, head, group, dim, v_dim, padded, first_block; };
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

__device__ float max_of_lanes(float x) {
  for (int s = 16; s; s /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, s));
  return x;
}

__device__ float sum_of_lanes(float x) {
  for (int s = 16; s; s /= 2) x += __shfl_xor_sync(~0u, x, s);
  return x;
}

// O = dO * D / sum(dO^2), but for one element, which makes up for the rounding of all others. It is the one with the
// smallest |dO| that is not tiny, since its own rounding then counts for nothing.
extern "C" __global__ void make_up(const float* __restrict__ tensors, u16* __restrict__ work,
                                   const MadeUp* __restrict__ entries) {
  const MadeUp m = entries[blockIdx.y];
  EACH_ROW(row, m.rows) {
    const i64 token = m.reversed ? m.rows - 1 - row : row;
    for (int g = 0; g < m.group; ++g) {
      const u16* d_o = work + m.d_o + (row * m.group + g) * m.padded;
      u16* o = work + m.target + (row * m.group + g) * m.padded;
      const float d = tensors[m.d + token * m.stride + g];
      // A head has at most 256 elements, which are 8 a lane. Squares are those of dO / max |dO|: they cannot overflow.
      float x[8];
      float largest = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int e = threadIdx.x * 2 + i / 2 * 64 + i % 2;
        x[i] = e < m.padded ? widen(d_o[e]) : 0;
        largest = fmaxf(largest, fabsf(x[i]));
      }
      largest = max_of_lanes(largest);
      const float unit = largest > 0 ? 1 / largest : 0;
      float sum = 0, smallest = 2;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float scaled = x[i] * unit;
        sum += scaled * scaled;
        if (fabsf(scaled) >= 1.0f / 256) smallest = fminf(smallest, fabsf(scaled));
      }
      sum = sum_of_lanes(sum);
      smallest = -max_of_lanes(-smallest);
      // The first element of that size: lanes in order, then their elements.
      int own = -1;
#pragma unroll
      for (int i = 7; i >= 0; --i)
        if (fabsf(x[i] * unit) == smallest) own = i;
      const unsigned holders = __ballot_sync(~0u, own >= 0);
      if (!holders || threadIdx.x != __ffs(holders) - 1) own = -1;
      const float factor = sum > 0 ? d / sum * unit : 0;
      float made = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const u16 y = narrow(x[i] * unit * factor);
        if (i != own) made += x[i] * widen(y);
      }
      made = sum_of_lanes(made);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int e = threadIdx.x * 2 + i / 2 * 64 + i % 2;
        const float y = i == own ? (d - made) / x[i] : x[i] * unit * factor;
        if (e < m.padded) o[e] = narrow(y);
      }
    }
  }
}

__device__ i64 row_in(const PieceSpan& piece, i64 row) {
  if (row < piece.start || row >= piece.end) return -1;
  return piece.place + (piece.reversed ? piece.end - 1 - row : row - piece.start);
}

// The spans of the block of 64 rows or keys that `row` is in.
#define EACH_SPAN(at, row, first_block)                                                         \
  for (int span_ = starts[(first_block) + (row) / 64], end_ = starts[(first_block) + (row) / 64 + 1]; span_ < end_; \
       ++span_)                                                                                 \
    if (const i64 at = row_in(spans[span_], row); at >= 0)

// Outputs of pieces, merged by their LSE in the order of the pieces. A row of one piece is copied.
extern "C" __global__ void merge_outputs(const u16* __restrict__ o, const float* __restrict__ lse,
                                         float* __restrict__ out, const RowHead* __restrict__ heads,
                                         const int* __restrict__ starts, const PieceSpan* __restrict__ spans) {
  const RowHead h = heads[blockIdx.y];
  u16* narrow_out = (u16*)out + h.values;
  EACH_ROW(row, h.rows) {
    int count = 0;
    i64 only = 0;
    EACH_SPAN(at, row, h.first_block) {
      ++count;
      only = at;
    }
    const i64 place = row * h.heads + h.first_head;
    const int width = h.group * h.dim;
    if (h.narrow && h.dim % 8 == 0) {
      for (int i = threadIdx.x * 8; i < width; i += 256) {
        const int g = i / h.dim, e = i % h.dim;
        int4 x = make_int4(0, 0, 0, 0);
        if (count) x = *(const int4*)(o + (only * h.group + g) * h.padded + e);
        *(int4*)(narrow_out + place * h.dim + i) = x;
      }
    } else if (h.narrow) {
      for (int i = threadIdx.x; i < width; i += 32)
        narrow_out[place * h.dim + i] = count ? o[(only * h.group + i / h.dim) * h.padded + i % h.dim] : 0;
    } else if (count <= 1) {
      for (int i = threadIdx.x; i < width; i += 32)
        out[h.values + place * h.dim + i] =
            count ? widen(o[(only * h.group + i / h.dim) * h.padded + i % h.dim]) : 0;
    } else {
      for (int g = 0; g < h.group; ++g) {
        float max = NOTHING, total = 0;
        EACH_SPAN(at, row, h.first_block) max = fmaxf(max, lse[at * h.group + g]);
        if (max == NOTHING) max = 0;
        EACH_SPAN(at, row, h.first_block) total += expf(lse[at * h.group + g] - max);
        for (int e = threadIdx.x; e < h.dim; e += 32) {
          float sum = 0;
          EACH_SPAN(at, row, h.first_block) {
            const float weight = expf(lse[at * h.group + g] - max);
            if (weight != 0) sum += weight * widen(o[(at * h.group + g) * h.padded + e]);
          }
          out[h.values + (place + g) * h.dim + e] = total > 0 ? sum / total : sum;
        }
        if (threadIdx.x == 0) out[h.lse + place + g] = max + logf(total);
      }
    }
    if (count <= 1)
      for (int g = threadIdx.x; g < h.group; g += 32)
        out[h.lse + place + g] = count ? lse[only * h.group + g] : NOTHING;
  }
}

__device__ float4 widen4(const u16* x) {
  const ushort4 y = *(const ushort4*)x;
  return make_float4(widen(y.x), widen(y.y), widen(y.z), widen(y.w));
}

__device__ void add(float4& sum, float4 x) {
  sum.x += x.x;
  sum.y += x.y;
  sum.z += x.z;
  sum.w += x.w;
}

// dQ of pieces, summed in their order.
extern "C" __global__ void sum_rows(const u16* __restrict__ dq, float* __restrict__ out,
                                    const RowHead* __restrict__ heads, const int* __restrict__ starts,
                                    const PieceSpan* __restrict__ spans) {
  const RowHead h = heads[blockIdx.y];
  const int width = h.group * h.dim;
  EACH_ROW(row, h.rows) {
    float* to = out + h.values + (row * h.heads + h.first_head) * h.dim;
    if (h.dim % 4 == 0) {
      for (int i = threadIdx.x * 4; i < width; i += 128) {
        const int g = i / h.dim, e = i % h.dim;
        float4 sum = make_float4(0, 0, 0, 0);
        EACH_SPAN(at, row, h.first_block) add(sum, widen4(dq + (at * h.group + g) * h.padded + e));
        *(float4*)(to + i) = sum;
      }
    } else {
      for (int i = threadIdx.x; i < width; i += 32) {
        const int g = i / h.dim, e = i % h.dim;
        float sum = 0;
        EACH_SPAN(at, row, h.first_block) sum += widen(dq[(at * h.group + g) * h.padded + e]);
        to[i] = sum;
      }
    }
  }
}

__device__ void sum_key(const u16* __restrict__ gradient, float* __restrict__ to, int dim, const KeyHead& h,
                        const int* __restrict__ starts, const PieceSpan* __restrict__ spans, i64 key) {
  if (dim % 4 == 0) {
    for (int e = threadIdx.x * 4; e < dim; e += 128) {
      float4 sum = make_float4(0, 0, 0, 0);
      EACH_SPAN(at, key, h.first_block)
        for (int g = 0; g < h.group; ++g) add(sum, widen4(gradient + (at * h.group + g) * h.padded + e));
      *(float4*)(to + e) = sum;
    }
  } else {
    for (int e = threadIdx.x; e < dim; e += 32) {
      float sum = 0;
      EACH_SPAN(at, key, h.first_block)
        for (int g = 0; g < h.group; ++g) sum += widen(gradient[(at * h.group + g) * h.padded + e]);
      to[e] = sum;
    }
  }
}

// dK and dV of pieces and query heads, summed in that order.
extern "C" __global__ void sum_keys(const u16* __restrict__ dk, const u16* __restrict__ dv, float* __restrict__ out,
                                    const KeyHead* __restrict__ heads, const int* __restrict__ starts,
                                    const PieceSpan* __restrict__ spans) {
  const KeyHead h = heads[blockIdx.y];
  EACH_ROW(key, h.keys) {
    const i64 place = key * h.heads + h.head;
    sum_key(dk, out + h.dk + place * h.dim, h.dim, h, starts, spans, key);
    sum_key(dv, out + h.dv + place * h.v_dim, h.v_dim, h, starts, spans, key);
  }
}
