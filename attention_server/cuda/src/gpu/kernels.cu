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

// Checked against tables.rs, which checks the same sizes.
#define SIZE(type, bytes) static_assert(sizeof(type) == bytes, #type)

struct Move { i64 source, target; int rows, stride, group, dim, padded, reversed; };
struct RowMove { i64 source, target; int rows, stride, group, reversed; };
struct MadeUp { i64 d, d_o, moved, o; int rows, stride, group, dim, padded, reversed; };
struct RowHead { i64 values, lse; int rows, heads, first_head, group, dim, padded, first_block, narrow; };
struct KeyHead { i64 dk, dv; int keys, heads, head, group, dim, v_dim, padded, first_block; };
struct PieceSpan { i64 place; int start, end, reversed, zero; };

SIZE(Move, 40);
SIZE(RowMove, 32);
SIZE(MadeUp, 56);
SIZE(RowHead, 48);
SIZE(KeyHead, 48);
SIZE(PieceSpan, 24);

#define EACH_ROW(row, rows)                                                         \
  for (i64 row = (i64)blockIdx.x * blockDim.y + threadIdx.y; row < (rows); row += (i64)gridDim.x * blockDim.y)

// Eight 16-bit elements, as they are loaded and stored at once.
union Eight {
  int4 all;
  u16 each[8];
};

__device__ Eight load(const u16* from) {
  Eight x;
  x.all = *(const int4*)from;
  return x;
}

__device__ Eight zeros() {
  Eight x;
  x.all = make_int4(0, 0, 0, 0);
  return x;
}

__device__ void move_head(const u16* __restrict__ tensors, u16* __restrict__ work, const Move& m) {
  const int width = m.group * m.padded;
  const bool wide = m.dim % 8 == 0;
  EACH_ROW(row, m.rows) {
    const u16* from = tensors + m.source + row * m.stride;
    u16* to = work + m.target + (m.reversed ? m.rows - 1 - row : row) * width;
    if (wide) {
      for (int i = threadIdx.x * 8; i < width; i += 256) {
        const int head = i / m.padded, e = i % m.padded;
        *(int4*)(to + i) = (e < m.dim ? load(from + head * m.dim + e) : zeros()).all;
      }
    } else {
      for (int i = threadIdx.x; i < width; i += 32) {
        const int head = i / m.padded, e = i % m.padded;
        to[i] = e < m.dim ? from[head * m.dim + e] : 0;
      }
    }
  }
}

__device__ void move_rows(const float* __restrict__ tensors, float* __restrict__ work, const RowMove& m) {
  // As many rows a warp as it has lanes for.
  const int together = max(32 / m.group, 1);
  const int of_warp = threadIdx.x / m.group;
  EACH_ROW(turn, (m.rows + together - 1) / together) {
    const i64 row = turn * together + (together > 1 ? of_warp : 0);
    if (row >= m.rows || (together > 1 && of_warp >= together)) continue;
    const i64 to = m.reversed ? m.rows - 1 - row : row;
    for (int g = together > 1 ? threadIdx.x % m.group : threadIdx.x; g < m.group; g += 32)
      work[m.target + to * m.group + g] = tensors[m.source + row * m.stride + g];
  }
}

template <int lanes> __device__ float max_of(float x) {
  for (int s = lanes / 2; s; s /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, s));
  return x;
}

template <int lanes> __device__ float sum_of(float x) {
  for (int s = lanes / 2; s; s /= 2) x += __shfl_xor_sync(~0u, x, s);
  return x;
}

// O = dO * D / sum(dO^2), but for one element, which makes up for the rounding of all others. It is the one with the
// smallest |dO| that is not tiny, since its own rounding then counts for nothing. So many lanes share a row of one query
// head, with eight elements each; dO is moved along.
template <int lanes>
__device__ void make_up(const u16* __restrict__ tensors, u16* __restrict__ work, const MadeUp& m) {
  const int lane = threadIdx.x % lanes, first_lane = threadIdx.x - lane, e = lane * 8;
  const unsigned total = (unsigned)m.rows * m.group;
  // All lanes of a warp go round as often as each other, since they exchange what they have.
  for (unsigned first = (blockIdx.x * blockDim.y + threadIdx.y) * (32 / lanes); first < total;
       first += gridDim.x * blockDim.y * (32 / lanes)) {
    const unsigned item = first + threadIdx.x / lanes;
    const bool inside = item < total;
    const i64 row = inside ? item / m.group : 0;
    const int g = inside ? item % m.group : 0;
    const u16* from = tensors + m.d_o + (row * m.stride + g) * m.dim;
    const float d = ((const float*)tensors)[m.d + row * m.stride + g];
    Eight d_o = zeros();
    if (m.dim % 8 == 0) {
      if (e < m.dim) d_o = load(from + e);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (e + i < m.dim) d_o.each[i] = from[e + i];
    }
    float x[8], largest = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      x[i] = widen(d_o.each[i]);
      largest = fmaxf(largest, fabsf(x[i]));
    }
    largest = max_of<lanes>(largest);
    // Squares are those of dO / max |dO|: they cannot overflow. Below the smallest normal float the reciprocal would; D is
    // as good as zero then.
    const float unit = largest >= 1.17549435e-38f ? 1 / largest : 0;
    float sum = 0, smallest = 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float scaled = x[i] * unit;
      sum += scaled * scaled;
      if (fabsf(scaled) >= 1.0f / 256) smallest = fminf(smallest, fabsf(scaled));
    }
    sum = sum_of<lanes>(sum);
    smallest = -max_of<lanes>(-smallest);
    // The first element of that size.
    int own = -1;
#pragma unroll
    for (int i = 7; i >= 0; --i)
      if (fabsf(x[i] * unit) == smallest) own = i;
    const unsigned holders = __ballot_sync(~0u, own >= 0) >> first_lane & (~0u >> (32 - lanes));
    if (lane != __ffs(holders) - 1) own = -1;
    const float factor = sum > 0 ? d / sum * unit : 0;
    Eight o;
    float made = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      o.each[i] = narrow(x[i] * unit * factor);
      if (i != own) made += x[i] * widen(o.each[i]);
    }
    made = sum_of<lanes>(made);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i == own) o.each[i] = narrow((d - made) / x[i]);
    if (inside && e < m.padded) {
      const i64 to = ((m.reversed ? m.rows - 1 - row : row) * m.group + g) * m.padded + e;
      *(int4*)(work + m.o + to) = o.all;
      *(int4*)(work + m.moved + to) = d_o.all;
    }
  }
}

// All that comes before cuDNN: entries of three tables, one block row each, from entry `first` on.
extern "C" __global__ void bring_in(const u16* __restrict__ tensors, u16* __restrict__ work,
                                    const Move* __restrict__ moves, const RowMove* __restrict__ row_moves,
                                    const MadeUp* __restrict__ made_up, int first, int n_moves, int n_row_moves) {
  int n = first + blockIdx.y;
  if (n < n_moves) return move_head(tensors, work, moves[n]);
  n -= n_moves;
  if (n < n_row_moves) return move_rows((const float*)tensors, (float*)work, row_moves[n]);
  // A head has at most 256 elements.
  const MadeUp& m = made_up[n - n_row_moves];
  if (m.padded <= 128) return make_up<16>(tensors, work, m);
  make_up<32>(tensors, work, m);
}

__device__ i64 row_in(const PieceSpan& piece, i64 row) {
  if (row < piece.start || row >= piece.end) return -1;
  return piece.place + (piece.reversed ? piece.end - 1 - row : row - piece.start);
}

// The spans of the block of 64 rows or keys that `row` is in; the only one of a head of one piece.
#define EACH_SPAN(at, row, first_block)                                                     \
  for (int block_ = (first_block) + (int)((row) / 64),                                      \
           span_ = (first_block) < 0 ? -1 - (first_block) : starts[block_],                 \
           end_ = (first_block) < 0 ? span_ + 1 : starts[block_ + 1];                       \
       span_ < end_; ++span_)                                                               \
    if (const i64 at = row_in(spans[span_], row); at >= 0)

// Outputs of pieces, merged by their LSE in the order of the pieces. A row of one piece is copied.
extern "C" __global__ void merge_outputs(const u16* __restrict__ o, const float* __restrict__ lse,
                                         float* __restrict__ out, const RowHead* __restrict__ heads,
                                         const int* __restrict__ starts, const PieceSpan* __restrict__ spans,
                                         int first) {
  const RowHead h = heads[first + blockIdx.y];
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

// Four elements: a warp then writes whole lines of f32.
__device__ void add(float4& sum, const u16* from) {
  const ushort4 x = *(const ushort4*)from;
  sum.x += widen(x.x);
  sum.y += widen(x.y);
  sum.z += widen(x.z);
  sum.w += widen(x.w);
}

// dQ of pieces, summed in their order.
__device__ void sum_rows(const u16* __restrict__ dq, float* __restrict__ out, const RowHead& h,
                         const int* __restrict__ starts, const PieceSpan* __restrict__ spans) {
  const int width = h.group * h.dim;
  EACH_ROW(row, h.rows) {
    float* to = out + h.values + (row * h.heads + h.first_head) * h.dim;
    if (h.dim % 4 == 0) {
      for (int i = threadIdx.x * 4; i < width; i += 128) {
        const int g = i / h.dim, e = i % h.dim;
        float4 sum = make_float4(0, 0, 0, 0);
        EACH_SPAN(at, row, h.first_block) add(sum, dq + (at * h.group + g) * h.padded + e);
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
      EACH_SPAN(at, key, h.first_block) {
        const u16* from = gradient + at * h.group * h.padded + e;
#pragma unroll 4
        for (int g = 0; g < h.group; ++g) add(sum, from + g * h.padded);
      }
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
__device__ void sum_keys(const u16* __restrict__ dk, const u16* __restrict__ dv, float* __restrict__ out,
                         const KeyHead& h, const int* __restrict__ starts, const PieceSpan* __restrict__ spans) {
  EACH_ROW(key, h.keys) {
    const i64 place = key * h.heads + h.head;
    sum_key(dk, out + h.dk + place * h.dim, h.dim, h, starts, spans, key);
    sum_key(dv, out + h.dv + place * h.v_dim, h.v_dim, h, starts, spans, key);
  }
}

// All that comes after cuDNN's backward: entries of two tables, one block row each, from entry `first` on.
extern "C" __global__ void sum_gradients(const u16* __restrict__ dq, const u16* __restrict__ dk,
                                         const u16* __restrict__ dv, float* __restrict__ out,
                                         const RowHead* __restrict__ row_heads, const int* __restrict__ row_starts,
                                         const PieceSpan* __restrict__ row_spans,
                                         const KeyHead* __restrict__ key_heads, const int* __restrict__ key_starts,
                                         const PieceSpan* __restrict__ key_spans, int first, int n_row_heads) {
  const int n = first + blockIdx.y;
  if (n < n_row_heads) return sum_rows(dq, out, row_heads[n], row_starts, row_spans);
  sum_keys(dk, dv, out, key_heads[n - n_row_heads], key_starts, key_spans);
}
