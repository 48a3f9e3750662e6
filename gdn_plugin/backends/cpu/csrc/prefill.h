// Chunked gated delta rule (Yang et al., arXiv:2412.06464, section 3.3) for one key head of one sequence.
//
// With G_ij = exp(g_{j+1} + .. + g_i) and S the state before the chunk:
//     u_i = beta_i (v_i - G_i0 S k_i) - sum_{j<i} beta_i G_ij (k_i.k_j) u_j       the delta rule's corrections
//     o_i = scale (G_i0 S q_i + sum_{j<=i} G_ij (q_i.k_j) u_j)
//     S  <- G_C0 S + sum_j G_Cj u_j k_j^T
// K K^T and Q K^T are made once a key head and serve all its value heads. Columns of V are independent of one another
// once these are known, so a chunk is worked off in panels of V (lanes run over V, the state is held as [K, V]), whose
// state and corrections stay in the first two cache levels. G is built row by row from products of exp(g): no
// difference of sums, no overflow, exact zeros.
//
// With bf16 dot products (DOT) the operands of all products but the triangular solve are rounded to bf16; S, u and
// every sum are fp32.
#pragma once

#include <algorithm>
#include <vector>

#include "common.h"
#include "matmul.h"

namespace gdn {

template <bool DOT>
class Prefill {
 public:
  static constexpr int C = 32;  // tokens of a chunk
  static constexpr int MR = 4;
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int NR = 4;  // 32 vector registers
  static constexpr int KR = 8;  // rows of K K^T made at a time
#else
  static constexpr int NR = 2;  // 16 vector registers
  static constexpr int KR = 4;
#endif
  static constexpr int PANEL = NR * LANES;            // columns of V worked on at a time
  static constexpr int STEP = DOT ? 2 : 1;            // numbers along the reduction in one 32-bit element
  static constexpr int ROWS = LANES > 8 ? LANES : 8;  // token rows are padded with zeros to a multiple of this
  static_assert(C % ROWS == 0 && ROWS % MR == 0 && MR % 2 == 0 && ROWS % KR == 0 && C % (2 * LANES) == 0);

  static int64_t panels(int64_t value_dim) { return (value_dim + PANEL - 1) / PANEL; }

  struct Part {  // what one task does
    int64_t sequence, key_head, head_begin, head_end, panel_begin, panel_end;
  };

  Prefill(const PrefillArguments& arguments, const Part& own_part)
      : p(arguments),
        part(own_part),
        K(round_up(arguments.size.key_dim, LANES * STEP)),
        E(K / STEP),
        heads(own_part.head_end - own_part.head_begin),
        panel_count(own_part.panel_end - own_part.panel_begin),
        width(panel_count * PANEL) {
    const int64_t state_floats = heads * K * width;
    const struct {
      float** where;
      int64_t floats;
    } pieces[] = {{&rows, 2 * C * E},    {&kT, E * C},
                  {&k_pairs, C / 2 * K}, {&kk, C * C},
                  {&qk, C * C},          {&stage, 2 * K},
                  {&minus_a, C * C},     {&attention, C * C},
                  {&v, C * width},       {&u, C * PANEL},
                  {&u_pairs, C * PANEL}, {&u_end, C * PANEL},
                  {&S, state_floats},    {&S_pairs, DOT ? state_floats / 2 : 0}};
    int64_t total = 0;
    for (const auto& piece : pieces) total += Scratch::piece(piece.floats);
    Scratch& scratch = Scratch::of_this_thread(total);
    for (const auto& piece : pieces) *piece.where = scratch.take(piece.floats);
  }

  void run() {
    const int64_t begin = p.cu_seqlens[part.sequence], end = p.cu_seqlens[part.sequence + 1];
    const int64_t row = p.state_indices[part.sequence];
    const bool fresh = !p.has_initial_state[part.sequence];
    if (fresh) {
      std::memset(S, 0, size_t(heads * K * width) * sizeof(float));
    } else {
      for (int64_t h = 0; h < heads; h++) read_state(h, pool_row(p.state, row, h));
    }
    bool is_zero = fresh;
    const int64_t every = p.checkpoints.data != nullptr ? p.checkpoint_every : 0;
    int64_t checkpoint = every > 0 ? p.checkpoint_cu_starts[part.sequence] : 0;
    for (int64_t t = begin; t < end;) {
      const int64_t done = t - begin;
      int64_t n = std::min<int64_t>(C, end - t);
      if (every > 0) n = std::min(n, every - done % every);
      prepare(t, n);
      if (is_zero && !keys_are_finite(n)) {  // zero times infinity or NaN is NaN
        is_zero = false;
        if (DOT) std::memset(S_pairs, 0, size_t(heads * E * width) * sizeof(float));
      }
      for (int64_t h = 0; h < heads; h++) {
        weigh(part.head_begin + h, t, n);
        for (int64_t panel = 0; panel < panel_count; panel++) work_off(h, panel, t, n, is_zero);
      }
      is_zero = false;
      t += n;
      if (every > 0 && (done + n) % every == 0) {
        for (int64_t h = 0; h < heads; h++) write_state(h, pool_row(p.checkpoints, checkpoint, h), p.checkpoints.dtype);
        checkpoint++;
      }
    }
    for (int64_t h = 0; h < heads; h++) write_state(h, pool_row(p.state, row, h), p.state.dtype);
  }

 private:
  const PrefillArguments& p;
  const Part& part;
  const int64_t K, E;  // K padded, and the 32-bit elements that hold it
  const int64_t heads, panel_count, width;

  float* rows;       // [2 C, E]: k, then q
  float* kT;         // [E, C]
  float* k_pairs;    // [C / 2, K]: neighbouring tokens of k in one element (DOT)
  float* kk;         // [C, C]: k_i . k_j
  float* qk;         // [C, C]: q_i . k_j
  float* stage;      // [2, K]
  float* minus_a;    // [C, C]: -beta_i G_ij k_i.k_j below the diagonal
  float* attention;  // [C, C / STEP]: scale G_ij q_i.k_j on and below the diagonal
  float* v;          // [C, width]
  float* u;          // [C, PANEL]
  float* u_pairs;    // [C / 2, PANEL]: u as an operand (DOT)
  float* u_end;      // [C / STEP, PANEL]: G_Cj u_j as an operand
  float* S;          // per head and panel [K, PANEL]
  float* S_pairs;    // the same as an operand: [E, PANEL] (DOT)
  alignas(64) float decay[C], beta[C], from_start[C], to_end[C];

  float* state_of(int64_t h, int64_t panel) const { return S + (h * panel_count + panel) * K * PANEL; }
  float* pairs_of(int64_t h, int64_t panel) const { return S_pairs + (h * panel_count + panel) * E * PANEL; }
  void* pool_row(const Pool& pool, int64_t row, int64_t h) const {
    const int64_t head_size = p.size.value_dim * p.size.key_dim;
    return at(pool.data, row * pool.row + (part.head_begin + h) * head_size, pool.dtype);
  }

  // One token's k or q in fp32, normalised where asked for.
  void read_token(float* to, const Rows& x, int64_t t) const {
    load_row(to, at(x.data, t * x.row + part.key_head * x.head, x.dtype), x.dtype, p.size.key_dim, K);
    if (p.use_qk_l2norm) l2_normalise(to, K, x.dtype);
  }

  void as_operand(float* to, const float* row) const {
    if constexpr (DOT) {
      for (int64_t i = 0; i < K; i += 2 * LANES) store(to + i / 2, join(load(row + i), load(row + i + LANES)));
    } else {
      std::memcpy(to, row, size_t(K) * sizeof(float));
    }
  }

  // What the chunk's value heads share: rows, kT, k_pairs, kk, qk.
  void prepare(int64_t t, int64_t n) {
    const int64_t padded = round_up(n, ROWS);
    for (int64_t i = 0; i < padded; i += 2) {
      for (int64_t j = 0; j < 2; j++) {
        float* const k_row = stage + j * K;
        if (i + j < n) {
          read_token(k_row, p.q, t + i + j);
          as_operand(rows + (C + i + j) * E, k_row);
          read_token(k_row, p.k, t + i + j);
          as_operand(rows + (i + j) * E, k_row);
        } else {
          std::memset(k_row, 0, size_t(K) * sizeof(float));
          std::memset(rows + (C + i + j) * E, 0, size_t(E) * sizeof(float));
          std::memset(rows + (i + j) * E, 0, size_t(E) * sizeof(float));
        }
      }
      if constexpr (DOT) {
        for (int64_t c = 0; c < K; c += LANES) {
          store(k_pairs + i / 2 * K + c, pair(load(stage + c), load(stage + K + c)));
        }
      }
    }
    for (int64_t r = 0; r < padded; r += LANES) {
      for (int64_t c = 0; c < E; c += LANES) transpose_block(kT + c * C + r, C, rows + r * E + c, E);
    }
    for (int64_t r = 0; r < padded; r += KR) {
      for (int64_t c = 0; c < r + KR; c += 2 * LANES) {
        if (c + LANES < r + KR) {
          product_with_k<2>(kk + r * C + c, rows + r * E, c);
          product_with_k<2>(qk + r * C + c, rows + (C + r) * E, c);
        } else {
          product_with_k<1>(kk + r * C + c, rows + r * E, c);
          product_with_k<1>(qk + r * C + c, rows + (C + r) * E, c);
        }
      }
    }
  }

  bool keys_are_finite(int64_t n) const {
    float total = 0.0f;
    for (int64_t i = 0; i < n; i++) total += kk[i * C + i];
    return std::isfinite(total);
  }

  static void transpose_block(float* to, int64_t to_stride, const float* from, int64_t from_stride) {
    vf x[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) x[i] = load(from + i * from_stride);
    transpose(x);
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) store(to + i * to_stride, x[i]);
  }

  template <int COLUMNS>
  void product_with_k(float* result, const float* operand, int64_t column) const {
    vf x[KR][COLUMNS] = {};
    accumulate<KR, COLUMNS, DOT>(x, operand, E, 1, kT + column, C, E);
#pragma GCC unroll 8
    for (int i = 0; i < KR; i++) {
#pragma GCC unroll 2
      for (int c = 0; c < COLUMNS; c++) store(result + i * C + c * LANES, x[i][c]);
    }
  }

  // What a value head's panels share: decays, minus_a, attention, v.
  void weigh(int64_t head, int64_t t, int64_t n) {
    const int64_t padded = round_up(n, ROWS);
    const float* g = static_cast<const float*>(p.g.data) + t * p.g.row + head * p.g.column;
    const float* b = static_cast<const float*>(p.beta.data) + t * p.beta.row + head * p.beta.column;
    for (int64_t i = 0; i < padded; i++) {
      decay[i] = i < n ? g[i * p.g.row] : 0.0f;
      beta[i] = i < n ? b[i * p.beta.row] : 0.0f;
    }
    if (!p.exp_gate) {
      for (int64_t i = 0; i < padded; i += LANES) store(decay + i, vexp(load(decay + i)));
    }
    const float scale = float(p.scale);
    constexpr int PARTS = C / LANES;
    vf G[PARTS] = {};
    float start = 1.0f;
    for (int64_t i = 0; i < n; i++) {
      start *= decay[i];
      from_start[i] = start;
      vf a[PARTS];
#pragma GCC unroll 8
      for (int c = 0; c < PARTS; c++) {
        const vi j = iota() + c * LANES, here = j == splat_i(int32_t(i)), before = j < splat_i(int32_t(i));
        G[c] = select(here, splat(1.0f), G[c] * decay[i]);
        store(minus_a + i * C + c * LANES, select(before, G[c] * load(kk + i * C + c * LANES) * -beta[i], vf{}));
        a[c] = select(before | here, G[c] * load(qk + i * C + c * LANES) * scale, vf{});
      }
      store_attention(attention + i * (C / STEP), a);
    }
    for (int c = 0; c < PARTS; c++) {
      store(to_end + c * LANES, select(iota() + c * LANES < splat_i(int32_t(n)), G[c], vf{}));
    }
    // Rows that only fill up a block: everything made of them is zero.
    for (int64_t i = n; i < padded; i++) {
      from_start[i] = 0.0f;
      std::memset(minus_a + i * C, 0, C * sizeof(float));
      std::memset(attention + i * (C / STEP), 0, C / STEP * sizeof(float));
      std::memset(v + i * width, 0, size_t(width) * sizeof(float));
    }
    const int64_t first = part.panel_begin * PANEL, used = std::min(width, p.size.value_dim - first);
    for (int64_t i = 0; i < n; i++) {
      const int64_t offset = (t + i) * p.v.row + head * p.v.head + first;
      load_row(v + i * width, at(p.v.data, offset, p.v.dtype), p.v.dtype, used, width);
    }
  }

  static void store_attention(float* to, const vf (&a)[C / LANES]) {
#pragma GCC unroll 8
    for (int c = 0; c < C / LANES; c += STEP) {
      if constexpr (DOT) {
        store(to + c / 2 * LANES, join(a[c], a[c + 1]));
      } else {
        store(to + c * LANES, a[c]);
      }
    }
  }

  // One chunk of one panel: u, out, and the state behind it.
  void work_off(int64_t h, int64_t panel, int64_t t, int64_t n, bool is_zero) {
    const int64_t used = is_zero ? 0 : E;
    const float* const operand = DOT ? pairs_of(h, panel) : state_of(h, panel);
    for (int64_t i = 0; i < n; i += MR) {
      vf x[MR][NR] = {};
      accumulate<MR, NR, DOT>(x, rows + i * E, E, 1, operand, PANEL, used);
      const float* values = v + i * width + panel * PANEL;
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
        for (int c = 0; c < NR; c++) {
          x[m][c] = (load(values + m * width + c * LANES) - x[m][c] * from_start[i + m]) * beta[i + m];
        }
      }
      solve(x, i);
    }
    const float scale = float(p.scale);
    for (int64_t i = 0; i < n; i += MR) {
      vf x[MR][NR] = {};
      accumulate<MR, NR, DOT>(x, rows + (C + i) * E, E, 1, operand, PANEL, used);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
        const float factor = from_start[i + m] * scale;
#pragma GCC unroll 8
        for (int c = 0; c < NR; c++) x[m][c] *= factor;
      }
      accumulate<MR, NR, DOT>(x, attention + i * (C / STEP), C / STEP, 1, DOT ? u_pairs : u, PANEL, i / STEP);
      attend_block(x, i);
      write_out(x, h, panel, t + i, std::min<int64_t>(MR, n - i));
    }
    update(h, panel, n);
  }

  // x[m] += sum over i <= j <= i + m of attention[i + m][j] u_j: the block on the diagonal, where later tokens are left
  // out and not multiplied by zero, since one of them may be NaN.
  void attend_block(vf (&x)[MR][NR], int64_t i) const {
    const float* const from = (DOT ? u_pairs : u) + i / STEP * PANEL;
#pragma GCC unroll 8
    for (int j = 0; j < MR / STEP; j++) {
#pragma GCC unroll 8
      for (int c = 0; c < NR; c++) {
        const vf y = load(from + j * PANEL + c * LANES);
        // Of a pair, the first of its two tokens may only see itself, which is the low half.
        const vf first = DOT ? (vf)((vu)y & 0xffffu) : y;
#pragma GCC unroll 8
        for (int m = j * STEP; m < MR; m++) {
          const vf a = splat(attention[(i + m) * (C / STEP) + i / STEP + j]);
          x[m][c] = multiply_add<DOT>(x[m][c], a, m == j * STEP ? first : y);
        }
      }
    }
  }

  // Rows i..i+MR of u by forward substitution; x comes in as beta (v - G_i0 S k).
  void solve(vf (&x)[MR][NR], int64_t i) {
    accumulate<MR, NR, false>(x, minus_a + i * C, C, 1, u, PANEL, i);
#pragma GCC unroll 8
    for (int m = 1; m < MR; m++) {
#pragma GCC unroll 8
      for (int j = 0; j < m; j++) {
        const vf a = splat(minus_a[(i + m) * C + i + j]);
#pragma GCC unroll 8
        for (int c = 0; c < NR; c++) x[m][c] += a * x[j][c];
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; m += STEP) {
#pragma GCC unroll 8
      for (int c = 0; c < NR; c++) {
        store(u + (i + m) * PANEL + c * LANES, x[m][c]);
        const vf end = x[m][c] * to_end[i + m];
        if constexpr (DOT) {
          const int64_t where = (i + m) / 2 * PANEL + c * LANES;
          store(u + (i + m + 1) * PANEL + c * LANES, x[m + 1][c]);
          store(u_pairs + where, pair(x[m][c], x[m + 1][c]));
          store(u_end + where, pair(end, x[m + 1][c] * to_end[i + m + 1]));
        } else {
          store(u_end + (i + m) * PANEL + c * LANES, end);
        }
      }
    }
  }

  void write_out(const vf (&x)[MR][NR], int64_t h, int64_t panel, int64_t t, int64_t count) const {
    const int64_t first = (part.panel_begin + panel) * PANEL;
    const int64_t columns = std::min<int64_t>(PANEL, p.size.value_dim - first);
    const int64_t offset = t * p.out.row + (part.head_begin + h) * p.out.head + first;
    alignas(64) float row[PANEL];
    for (int m = 0; m < count; m++) {
      void* const to = at(p.out.data, offset + m * p.out.row, p.out.dtype);
      if (columns == PANEL && p.out.dtype == BF16) {
#pragma GCC unroll 8
        for (int c = 0; c < NR; c++) store_as<BF16>(at(to, c * LANES, BF16), x[m][c]);
      } else {
        for (int c = 0; c < NR; c++) store(row + c * LANES, x[m][c]);
        store_row(to, row, p.out.dtype, columns);
      }
    }
  }

  void update(int64_t h, int64_t panel, int64_t n) {
    const float* const left = DOT ? k_pairs : rows;
    float* state = state_of(h, panel);
    float* pairs = pairs_of(h, panel);
    const vf decayed = splat(from_start[n - 1]);
    for (int64_t k = 0; k < K; k += MR) {
      vf x[MR][NR];
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
        for (int c = 0; c < NR; c++) x[m][c] = load(state + m * PANEL + c * LANES) * decayed;
      }
      accumulate<MR, NR, DOT>(x, left + k, 1, DOT ? K : E, u_end, PANEL, (n + STEP - 1) / STEP);
#pragma GCC unroll 8
      for (int m = 0; m < MR; m++) {
#pragma GCC unroll 8
        for (int c = 0; c < NR; c++) {
          store(state + m * PANEL + c * LANES, x[m][c]);
          if (DOT && m % 2 == 0) store(pairs + m / 2 * PANEL + c * LANES, pair(x[m][c], x[m + 1][c]));
        }
      }
      state += MR * PANEL;
      pairs += MR / 2 * PANEL;
    }
  }

  // -- the state between its pool row, [V, K], and the panels, [K, PANEL] ------------------------------------------

  template <int64_t DT>
  void read_state_as(int64_t h, const void* row) {
    for (int64_t panel = 0; panel < panel_count; panel++) {
      float* const state = state_of(h, panel);
      for (int64_t j = 0; j < PANEL; j += LANES) {
        const int64_t value = (part.panel_begin + panel) * PANEL + j, left = p.size.value_dim - value;
        for (int64_t k = 0; k < K; k += LANES) {
          const int64_t columns = std::min<int64_t>(LANES, p.size.key_dim - k);
          vf x[LANES];
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) {
            const void* const from = at(row, (value + i) * p.size.key_dim + k, DT);
            x[i] = i >= left || columns <= 0 ? vf{}
                   : columns == LANES        ? load_as<DT>(from)
                                             : load_part<DT>(from, int(columns));
          }
          transpose(x);
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) store(state + (k + i) * PANEL + j, x[i]);
        }
      }
      if constexpr (DOT) {
        float* const pairs = pairs_of(h, panel);
        for (int64_t k = 0; k < K; k += 2) {
          for (int64_t j = 0; j < PANEL; j += LANES) {
            store(pairs + k / 2 * PANEL + j, pair(load(state + k * PANEL + j), load(state + (k + 1) * PANEL + j)));
          }
        }
      }
    }
  }

  template <int64_t DT>
  void write_state_as(int64_t h, void* row) const {
    for (int64_t panel = 0; panel < panel_count; panel++) {
      const float* const state = state_of(h, panel);
      for (int64_t j = 0; j < PANEL; j += LANES) {
        const int64_t value = (part.panel_begin + panel) * PANEL + j, left = p.size.value_dim - value;
        for (int64_t k = 0; k < p.size.key_dim; k += LANES) {
          const int64_t columns = std::min<int64_t>(LANES, p.size.key_dim - k);
          vf x[LANES];
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) x[i] = load(state + (k + i) * PANEL + j);
          transpose(x);
#pragma GCC unroll 16
          for (int i = 0; i < LANES; i++) {
            if (i >= left) continue;
            void* const to = at(row, (value + i) * p.size.key_dim + k, DT);
            if (columns == LANES) {
              store_as<DT>(to, x[i]);
            } else {
              store_part<DT>(to, x[i], int(columns));
            }
          }
        }
      }
    }
  }

  void read_state(int64_t h, const void* row) {
    if (p.state.dtype == F32) return read_state_as<F32>(h, row);
    if (p.state.dtype == BF16) return read_state_as<BF16>(h, row);
    return read_state_as<F16>(h, row);
  }
  void write_state(int64_t h, void* row, int64_t dtype) const {
    if (dtype == F32) return write_state_as<F32>(h, row);
    if (dtype == BF16) return write_state_as<BF16>(h, row);
    return write_state_as<F16>(h, row);
  }
};

// Rows of `out` that belong to no live sequence.
inline void zero_padding_rows(const Rows& out, const Sizes& size, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; t++) {
    for (int64_t h = 0; h < size.value_heads; h++) {
      zero_row(at(out.data, t * out.row + h * out.head, out.dtype), out.dtype, size.value_dim);
    }
  }
}

// Sequences up to this length are done in fp32 in any case. A host sends a prompt of a token or two as a prefill or, in
// company with drafts, as speculative tokens, which are fp32 throughout: its answer must not depend on the company.
constexpr int64_t SHORT = 8;

template <bool DOT>
inline void prefill(const PrefillArguments& p) {
  using Work = Prefill<DOT>;
  const int64_t group = p.size.value_heads / p.size.key_heads, panels = Work::panels(p.size.value_dim);
  std::vector<int64_t> live;
  for (int64_t i = 0; i < p.size.sequences; i++) {
    const int64_t begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
    if (begin == end) continue;
    if (!is_padding(p.state_indices[i], p.null_index)) {
      live.push_back(i);
    } else if (p.zero_padding) {
      zero_padding_rows(p.out, p.size, begin, end);
    }
  }
  if (p.zero_padding) zero_padding_rows(p.out, p.size, p.cu_seqlens[p.size.sequences], p.size.tokens);
  if (live.empty()) return;
  const auto length = [&](int64_t i) { return p.cu_seqlens[i + 1] - p.cu_seqlens[i]; };
  std::stable_sort(live.begin(), live.end(), [&](int64_t i, int64_t j) { return length(i) > length(j); });

  // A key head with all its value heads is one task; where that leaves threads idle it is split by value heads, then by
  // panels, and the parts each make their own K K^T.
  const int64_t base = int64_t(live.size()) * p.size.key_heads, threads = gdn_threads();
  const int64_t by_head = std::min(group, (threads + base - 1) / base);
  const int64_t by_panel = std::min(panels, (threads + base * by_head - 1) / (base * by_head));
  for_each_task(base * by_head * by_panel, [&](int64_t task) {
    const int64_t panel = task % by_panel, head = task / by_panel % by_head, rest = task / by_panel / by_head;
    const int64_t key_head = rest % p.size.key_heads, first = key_head * group;
    const typename Work::Part part{live[size_t(rest / p.size.key_heads)],
                                   key_head,
                                   first + group * head / by_head,
                                   first + group * (head + 1) / by_head,
                                   panels * panel / by_panel,
                                   panels * (panel + 1) / by_panel};
    if (DOT && length(part.sequence) <= SHORT) {
      Prefill<false>(p, {part.sequence, part.key_head, part.head_begin, part.head_end, part.panel_begin, part.panel_end})
          .run();
    } else {
      Work(p, part).run();
    }
  });
}

}  // namespace gdn
