// Work queue, per-thread scratch memory, checks of index values, the L2 norm and the gates.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "arguments.h"
#include "vec.h"

namespace gdn {

constexpr float L2_NORM_EPS = 1e-6f;

GDN_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Runs body(task) for every task in [0, tasks). A thread begins with its own share, the same one at every call, whose
// state its caches may still hold; then it takes what others have not begun: sequences have different lengths, and a
// core may be busy with something else.
template <typename Body>
void for_each_task(int64_t tasks, const Body& body) {
  struct alignas(64) Share {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };
  struct Shared {
    const Body* body;
    std::vector<Share> shares;
  } shared{&body, std::vector<Share>(size_t(std::max<int64_t>(1, std::min(tasks, gdn_threads()))))};
  const int64_t workers = int64_t(shared.shares.size());
  for (int64_t i = 0; i < workers; i++) {
    shared.shares[size_t(i)].next = tasks * i / workers;
    shared.shares[size_t(i)].end = tasks * (i + 1) / workers;
  }
  gdn_on_workers(
      tasks,
      [](void* context, int64_t worker) {
        auto& s = *static_cast<Shared*>(context);
        for (size_t i = 0; i < s.shares.size(); i++) {
          Share& share = s.shares[(size_t(worker) + i) % s.shares.size()];
          for (int64_t t; (t = share.next.fetch_add(1, std::memory_order_relaxed)) < share.end;) (*s.body)(t);
        }
      },
      &shared);
}

// Memory of one thread that lives as long as the thread and only ever grows, cut into aligned pieces by take().
class Scratch {
 public:
  static Scratch& of_this_thread(int64_t floats) {
    thread_local Scratch scratch;
    if (floats > scratch.size_) {
      std::free(scratch.base_);
      scratch.size_ = round_up(floats, 1024);
      scratch.base_ = static_cast<float*>(std::aligned_alloc(64, size_t(scratch.size_) * sizeof(float)));
      if (scratch.base_ == nullptr) {
        scratch.size_ = 0;
        throw std::bad_alloc();
      }
    }
    scratch.used_ = 0;
    return scratch;
  }
  static int64_t piece(int64_t floats) { return round_up(floats, 16); }
  float* take(int64_t floats) {
    float* p = base_ + used_;
    used_ += piece(floats);
    return p;
  }
  ~Scratch() { std::free(base_); }

 private:
  float* base_ = nullptr;
  int64_t size_ = 0, used_ = 0;
};

inline bool offsets_fit(const Integers& cu_seqlens, int64_t sequences, int64_t tokens) {
  int64_t last = 0;
  for (int64_t i = 0; i <= sequences; i++) {
    const int64_t offset = cu_seqlens[i];
    if (offset < last || offset > tokens) return false;
    last = offset;
  }
  return true;
}

inline bool rows_fit(const Integers& indices, int64_t count, int64_t rows) {
  for (int64_t i = 0; i < count; i++)
    if (indices[i] >= rows) return false;
  return true;
}

inline bool is_padding(int64_t row, int64_t null_index) { return row < 0 || row <= null_index; }

template <int64_t DT>
inline void l2_normalise_as(float* x, int64_t padded) {
  vf total{};
  for (int64_t i = 0; i < padded; i += LANES) {
    const vf y = load(x + i);
    total += y * y;
  }
  const float r = 1.0f / std::sqrt(sum(total) + L2_NORM_EPS);
  for (int64_t i = 0; i < padded; i += LANES) store(x + i, rounded(load(x + i) * r, DT));
}

// x[0:padded] <- x * rsqrt(sum(x^2) + eps), rounded to `dtype`; x is zero past its values.
inline void l2_normalise(float* x, int64_t padded, int64_t dtype) {
  if (dtype == BF16) return l2_normalise_as<BF16>(x, padded);
  if (dtype == F32) return l2_normalise_as<F32>(x, padded);
  return l2_normalise_as<F16>(x, padded);
}

// Gates of one token and `count` value heads from `head`: the natural log of the decay, and beta.
inline void gates_of(const Gates& gates, int64_t token, int64_t head, int64_t count, float* log_decay, float* beta) {
  float a[LANES] = {}, b[LANES] = {}, rate[LANES] = {};
  for (int64_t h0 = 0; h0 < count; h0 += LANES) {
    const int64_t n = count - h0 < LANES ? count - h0 : LANES;
    for (int64_t i = 0; i < n; i++) {
      const int64_t h = head + h0 + i;
      a[i] = scalar_from(gates.a.data, token * gates.a.row + h * gates.a.column, gates.a.dtype) +
             scalar_from(gates.dt_bias.data, h * gates.dt_bias.stride, gates.dt_bias.dtype);
      b[i] = scalar_from(gates.b.data, token * gates.b.row + h * gates.b.column, gates.b.dtype);
      rate[i] = scalar_from(gates.a_log.data, h * gates.a_log.stride, gates.a_log.dtype);
    }
    float g[LANES], s[LANES];
    store(g, -vexp(load(rate)) * softplus(load(a)));
    store(s, sigmoid(load(b)));
    for (int64_t i = 0; i < n; i++) {
      log_decay[h0 + i] = g[i];
      beta[h0 + i] = s[i];
    }
  }
}

inline void zero_row(void* p, int64_t dtype, int64_t n) { std::memset(p, 0, size_t(n) * (dtype == F32 ? 4 : 2)); }

}  // namespace gdn
