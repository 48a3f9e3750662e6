// Vectors of LANES floats: loads and stores in every io dtype, exp, log1p, transposes, and the dot-product step of the
// matrix products. One source for every instruction set: the width follows the compiler's target flags.
//
// Needs GCC 12 or Clang: vector extensions and __builtin_shufflevector.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "arguments.h"

#define GDN_INLINE inline __attribute__((always_inline))

namespace gdn {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

GDN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
GDN_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
// By initialiser, not by adding to zero: the float may be a pair of bf16, whose bits must survive.
template <typename V, typename T, int... I>
GDN_INLINE V repeat(T x, std::integer_sequence<int, I...>) {
  return V{((void)I, x)...};
}
GDN_INLINE vf splat(float x) { return repeat<vf>(x, std::make_integer_sequence<int, LANES>{}); }
GDN_INLINE vi splat_i(int32_t x) { return repeat<vi>(x, std::make_integer_sequence<int, LANES>{}); }
GDN_INLINE vf select(vi mask, vf yes, vf no) { return mask ? yes : no; }

template <int... I>
GDN_INLINE vi iota(std::integer_sequence<int, I...>) {
  return vi{I...};
}
GDN_INLINE vi iota() { return iota(std::make_integer_sequence<int, LANES>{}); }

// -- half-precision formats --------------------------------------------------------------------------------------

GDN_INLINE vf from_bf16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

GDN_INLINE vh to_bf16(vf x) {  // round to nearest even; NaN stays NaN
#if defined(__AVX512BF16__)
  return (vh)_mm512_cvtneps_pbh((__m512)x);
#else
  vu u = (vu)x;
  u = u + 0x7fffu + ((u >> 16) & 1u);
  u = (x != x) ? (vu{} + 0x7fc00000u) : u;
  return __builtin_convertvector(u >> 16, vh);
#endif
}

GDN_INLINE float half_to_float(uint16_t h) {
  // The exponent is rebased by a multiplication, which also makes subnormals right.
  const uint32_t sign = uint32_t(h & 0x8000u) << 16, rest = uint32_t(h & 0x7fffu) << 13;
  float x;
  if (rest >= 0x0f800000u) {  // infinity or NaN
    const uint32_t bits = sign | rest | 0x7f800000u;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  std::memcpy(&x, &rest, 4);
  x *= 5.192296858534828e33f;  // 2^112
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits |= sign;
  std::memcpy(&x, &bits, 4);
  return x;
}

GDN_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits >= 0x47800000u) return uint16_t(sign | (bits > 0x7f800000u ? 0x7e00u : 0x7c00u));
  if (bits < 0x38800000u) {  // subnormal: let the adder round to a multiple of 2^-24
    float y;
    std::memcpy(&y, &bits, 4);
    y += 0.5f;
    std::memcpy(&bits, &y, 4);
    return uint16_t(sign | (bits - 0x3f000000u));
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return uint16_t(sign | ((bits - 0x38000000u) >> 13));
}

GDN_INLINE vf from_f16(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  typedef __fp16 native __attribute__((vector_size(LANES * 2)));
  return __builtin_convertvector((native)x, vf);
#else
  vf y;
  for (int i = 0; i < LANES; i++) y[i] = half_to_float(x[i]);
  return y;
#endif
}

GDN_INLINE vh to_f16(vf x) {
#if defined(__AVX512F__)
  return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  typedef __fp16 native __attribute__((vector_size(LANES * 2)));
  return (vh) __builtin_convertvector(x, native);
#else
  vh y;
  for (int i = 0; i < LANES; i++) y[i] = float_to_half(x[i]);
  return y;
#endif
}

GDN_INLINE float scalar_from(const void* base, int64_t i, int64_t dtype) {
  if (dtype == F32) return static_cast<const float*>(base)[i];
  const uint16_t h = static_cast<const uint16_t*>(base)[i];
  if (dtype == F16) return half_to_float(h);
  const uint32_t bits = uint32_t(h) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Element i of a buffer of `dtype`.
GDN_INLINE const void* at(const void* base, int64_t i, int64_t dtype) {
  return static_cast<const char*>(base) + i * (dtype == F32 ? 4 : 2);
}
GDN_INLINE void* at(void* base, int64_t i, int64_t dtype) {
  return static_cast<char*>(base) + i * (dtype == F32 ? 4 : 2);
}

template <int64_t DT>
GDN_INLINE vf load_as(const void* p) {
  if constexpr (DT == F32) return load(static_cast<const float*>(p));
  const vh x = *static_cast<const vh_any*>(p);
  return DT == BF16 ? from_bf16(x) : from_f16(x);
}

template <int64_t DT>
GDN_INLINE void store_as(void* p, vf x) {
  if constexpr (DT == F32) {
    store(static_cast<float*>(p), x);
  } else {
    *static_cast<vh_any*>(p) = DT == BF16 ? to_bf16(x) : to_f16(x);
  }
}

template <int64_t DT>
GDN_INLINE vf load_part(const void* p, int count) {  // lanes past `count` are zero, and are not read
  alignas(64) char buffer[LANES * 4] = {};
  std::memcpy(buffer, p, size_t(count) * (DT == F32 ? 4 : 2));
  return load_as<DT>(buffer);
}

template <int64_t DT>
GDN_INLINE void store_part(void* p, vf x, int count) {
  alignas(64) char buffer[LANES * 4];
  store_as<DT>(buffer, x);
  std::memcpy(p, buffer, size_t(count) * (DT == F32 ? 4 : 2));
}

template <int64_t DT>
inline void load_row_as(float* dst, const void* src, int64_t n, int64_t padded) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(dst + i, load_as<DT>(at(src, i, DT)));
  if (i < n) {
    store(dst + i, load_part<DT>(at(src, i, DT), int(n - i)));
    i += LANES;
  }
  for (; i < padded; i += LANES) store(dst + i, vf{});
}

// dst[0:n] = src, dst[n:padded] = 0; `padded` is a multiple of LANES.
inline void load_row(float* dst, const void* src, int64_t dtype, int64_t n, int64_t padded) {
  if (dtype == BF16) return load_row_as<BF16>(dst, src, n, padded);
  if (dtype == F32) return load_row_as<F32>(dst, src, n, padded);
  return load_row_as<F16>(dst, src, n, padded);
}

template <int64_t DT>
inline void store_row_as(void* dst, const float* src, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store_as<DT>(at(dst, i, DT), load(src + i));
  if (i < n) store_part<DT>(at(dst, i, DT), load(src + i), int(n - i));
}

inline void store_row(void* dst, const float* src, int64_t dtype, int64_t n) {
  if (dtype == BF16) return store_row_as<BF16>(dst, src, n);
  if (dtype == F32) return store_row_as<F32>(dst, src, n);
  return store_row_as<F16>(dst, src, n);
}

GDN_INLINE vf rounded(vf x, int64_t dtype) {
  if (dtype == F32) return x;
  return dtype == BF16 ? from_bf16(to_bf16(x)) : from_f16(to_f16(x));
}

// -- functions ---------------------------------------------------------------------------------------------------

GDN_INLINE vf bounded(vf x, float low, float high) {  // NaN stays NaN
#if defined(__AVX512F__)
  return (vf)_mm512_min_ps((__m512)splat(high), _mm512_max_ps((__m512)splat(low), (__m512)x));
#elif defined(__AVX2__)
  return (vf)_mm256_min_ps((__m256)splat(high), _mm256_max_ps((__m256)splat(low), (__m256)x));
#else
  return select(x < low, splat(low), select(x > high, splat(high), x));
#endif
}

// exp(x) = 2^n P(r), r = x - n ln2 in [-0.35, 0.35]: degree 6, about 1 ulp. 0 below -103.97, infinity above 88.72.
GDN_INLINE vf vexp(vf x) {
  x = bounded(x, -104.0f, 89.0f);
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: the low bits of the sum are the rounded integer
  const vf t = x * 1.4426950408889634f + magic;
  const vf n = t - magic;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.3888889e-3f);
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two steps of scaling: 2^n alone leaves the range of normal numbers at both ends. Of a NaN, p is NaN already.
  const vi e = (vi)t - (vi)magic;
  const vi half = e >> 1;
  const vf a = (vf)((half + 127) << 23), b = (vf)((e - half + 127) << 23);
  return p * a * b;
#endif
}

// log(1 + y) for y >= 0, by log(u) * y / (u - 1) with u = fl(1 + y) (Kahan), log by the atanh series.
GDN_INLINE vf vlog1p(vf y) {
  const vf u = y + 1.0f;
  vi bits = (vi)u;
  const vi shifted = bits - 0x3f3504f3;  // mantissa in [sqrt(1/2), sqrt(2))
  const vi e = shifted >> 23;
  const vf m = (vf)(bits - (e << 23));
  const vf s = (m - 1.0f) / (m + 1.0f), z = s * s;
  vf p = splat(0.2222222f / 2.0f);
  p = p * z + 0.1428571429f;
  p = p * z + 0.2f;
  p = p * z + 0.3333333333f;
  p = p * z * s + s;
  const vf log_u = p * 2.0f + __builtin_convertvector(e, vf) * 0.6931471805599453f;
  const vf difference = u - 1.0f;
  return select(difference == 0.0f, y, log_u * (y / select(difference == 0.0f, splat(1.0f), difference)));
}

// 1 / (1 + 2^t) with t = -x log2(e): relative error below 2e-7 + 6e-8 |x|, no less than 2^-115, and 0 of -infinity.
GDN_INLINE vf sigmoid(vf x) {
#if defined(__AVX512F__)
  // Of +infinity, n is -infinity and p NaN, which scalef makes 0.
  const __m512 t = _mm512_min_ps((__m512)splat(115.0f), (__m512)(x * -1.4426950408889634f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vf f = (vf)_mm512_sub_ps(t, n);
#else
  const vf magic = splat(12582912.0f), t = bounded(x * -1.4426950408889634f, -120.0f, 115.0f);
  const vf shifted = t + magic, f = t - (shifted - magic);
#endif
  vf p = splat(1.326472731e-3f);  // 2^f - 1 over f in [-0.5, 0.5], fitted to a relative error of 9e-8
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  const vf y = (vf)_mm512_scalef_ps((__m512)p, n) + 1.0f, r = (vf)_mm512_rcp14_ps((__m512)y);  // y < 2^126
  const __mmask16 some = _mm512_cmp_ps_mask((__m512)x, (__m512)splat(-INFINITY), _CMP_NEQ_UQ);
  return (vf)_mm512_maskz_mul_ps(some, (__m512)r, (__m512)(2.0f - y * r));
#else
  const vf y = p * (vf)(((vi)shifted - (vi)magic + 127) << 23) + 1.0f;
  return select(x == splat(-INFINITY), vf{}, 1.0f / y);
#endif
}
GDN_INLINE vf silu(vf x) { return x * sigmoid(x); }  // NaN of -infinity, as torch's

// torch's softplus: the identity above 20.
GDN_INLINE vf softplus(vf x) { return select(x > 20.0f, x, vlog1p(vexp(select(x > 20.0f, splat(20.0f), x)))); }

// -- transposes --------------------------------------------------------------------------------------------------

template <int D, bool HIGH, int... I>
GDN_INLINE vf mix(vf a, vf b, std::integer_sequence<int, I...>) {
  // One side of a butterfly at distance D: HIGH takes the lanes with bit D set.
  return HIGH ? __builtin_shufflevector(a, b, ((I & D) ? I + LANES : (I | D))...)
              : __builtin_shufflevector(a, b, ((I & D) ? (I & ~D) + LANES : I)...);
}

template <int D>
GDN_INLINE void transpose_step(vf (&x)[LANES]) {
  using all = std::make_integer_sequence<int, LANES>;
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) {
    if (i & D) continue;
    const vf a = x[i], b = x[i + D];
    x[i] = mix<D, false>(a, b, all{});
    x[i + D] = mix<D, true>(a, b, all{});
  }
}

GDN_INLINE void transpose(vf (&x)[LANES]) {
  transpose_step<1>(x);
  transpose_step<2>(x);
  if constexpr (LANES > 4) transpose_step<LANES == 4 ? 1 : 4>(x);
  if constexpr (LANES > 8) transpose_step<LANES == 16 ? 8 : 1>(x);
}

template <int D, int... I>
GDN_INLINE vf swapped(vf x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, (I ^ D)...);
}

GDN_INLINE float sum(vf x) {
  using all = std::make_integer_sequence<int, LANES>;
  if constexpr (LANES > 8) x += swapped<LANES / 2>(x, all{});
  if constexpr (LANES > 4) x += swapped<LANES / 2 < 8 ? LANES / 2 : 4>(x, all{});
  x += swapped<2>(x, all{});
  x += swapped<1>(x, all{});
  return x[0];
}

template <int TAP, int... I>
GDN_INLINE vf every_fourth(const vf (&x)[4], std::integer_sequence<int, I...>) {
  const vf low = __builtin_shufflevector(x[0], x[1], (I < LANES / 2 ? 4 * I + TAP : 0)...);
  const vf high = __builtin_shufflevector(x[2], x[3], (I < LANES / 2 ? 4 * I + TAP : 0)...);
  return __builtin_shufflevector(low, high, (I < LANES / 2 ? I : I + LANES / 2)...);
}

// Lane i of the result is the sum of x[i].
GDN_INLINE vf sums(vf (&x)[LANES]) {
  using all = std::make_integer_sequence<int, LANES>;
  vf y[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 2) y[i] = mix<1, false>(x[i], x[i + 1], all{}) + mix<1, true>(x[i], x[i + 1], all{});
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i += 4) y[i] = mix<2, false>(y[i], y[i + 2], all{}) + mix<2, true>(y[i], y[i + 2], all{});
  if constexpr (LANES > 4) {
    constexpr int D = LANES > 4 ? 4 : 1;
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i += 8)
      y[i] = mix<D, false>(y[i], y[i + D], all{}) + mix<D, true>(y[i], y[i + D], all{});
  }
  if constexpr (LANES > 8) {
    constexpr int D = LANES > 8 ? 8 : 1;
    y[0] = mix<D, false>(y[0], y[D], all{}) + mix<D, true>(y[0], y[D], all{});
  }
  return y[0];
}

}  // namespace gdn
