// A vector of floats, used by all fused CPU kernels, and its functions.
//
// Each file isa_*.cpp compiles the kernels for one instruction set. Its macros define the width,
// and the few instructions that GCC's vector extension cannot express. Everything is in an unnamed
// namespace: if the linker shared an inline function of a wide instruction set with other files,
// older machines would crash.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
// GCC 12 warns about the undefined operand of its own intrinsics.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "isa.h"

#if T2T_ISA == T2T_PORTABLE
#include <torch/headeronly/util/Half.h>
#endif

namespace t2t {
namespace {

#if T2T_ISA >= T2T_AVX512
constexpr int kVectorBytes = 64;
#elif T2T_ISA == T2T_AVX2
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int64_t kLanes = kVectorBytes / 4;

typedef float Vec __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef uint64_t Longs __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2)));

template <typename To, typename From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

inline Vec all(float x) { return x - Vec{}; }
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// For a NaN and a number, the second argument.
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
// NaN stays NaN.
inline Vec clamp(Vec v, float low, float high) { return min(all(high), max(all(low), v)); }

// Lanes below n unchanged, zero elsewhere.
inline Vec first_lanes(Vec v, int64_t n) {
  Ints lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane < static_cast<int32_t>(n) ? v : Vec{};
}

// Four partial results of a vector's lanes: its halves combined until four lanes are left.
typedef float Vec4 __attribute__((vector_size(16)));
template <typename F>
inline Vec4 fold(Vec v, const F& combine) {
#if T2T_ISA >= T2T_AVX512
  const auto half = combine(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                            __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto half = v;
#endif
#if T2T_ISA >= T2T_AVX2
  return combine(__builtin_shufflevector(half, half, 0, 1, 2, 3),
                 __builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  return half;
#endif
}
inline float sum(Vec v) {
  const Vec4 s = fold(v, [](auto a, auto b) { return a + b; });
  return (s[0] + s[2]) + (s[1] + s[3]);
}
// The sum in double precision.
inline double wide_sum(Vec v) {
  typedef float Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef double Wide __attribute__((vector_size(kVectorBytes)));
  Narrow halves[2];
  std::memcpy(halves, &v, sizeof v);
  const Wide s =
      __builtin_convertvector(halves[0], Wide) + __builtin_convertvector(halves[1], Wide);
  double total = 0;
  for (int i = 0; i < kLanes / 2; ++i) total += s[i];
  return total;
}
inline float largest(Vec v) {
  const Vec4 s = fold(v, [](auto a, auto b) { return a > b ? a : b; });
  const float even = s[0] > s[2] ? s[0] : s[2], odd = s[1] > s[3] ? s[1] : s[3];
  return even > odd ? even : odd;
}

// --- bfloat16 and float16 ---

inline Vec load(const bf16* p) {
  Shorts s;
  std::memcpy(&s, p, sizeof s);
  return bits<Vec>(__builtin_convertvector(s, Words) << 16);
}

// Rounded to the nearest, ties to even; NaN stays NaN.
inline Words to_bf16(Vec v) {
  const Words u = bits<Words>(v);
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return v == v ? rounded : (u >> 16) | 0x40u;
}
inline void store(bf16* p, Vec v) {
  const Shorts s = __builtin_convertvector(to_bf16(v), Shorts);
  std::memcpy(p, &s, sizeof s);
}

#if T2T_ISA >= T2T_AVX512
inline Vec load(const half* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store(half* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, 0));
}
#elif T2T_ISA == T2T_AVX2
inline Vec load(const half* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store(half* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, 0));
}
#else
inline Vec load(const half* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i)
    v[i] = torch::headeronly::detail::fp16_ieee_to_fp32_value(p[i].word);
  return v;
}
inline void store(half* p, Vec v) {
  for (int i = 0; i < kLanes; ++i)
    p[i].word = torch::headeronly::detail::fp16_ieee_from_fp32_value(v[i]);
}
#endif

// The first n < kLanes elements, and zeros in the other lanes; no other memory is read.
template <typename T>
inline Vec load_first(const T* p, int64_t n) {
#if T2T_ISA >= T2T_AVX512
  if constexpr (std::is_same_v<T, float>) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
  } else {
    T elements[kLanes];
    const auto mask = static_cast<__mmask16>((1u << n) - 1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(elements), _mm256_maskz_loadu_epi16(mask, p));
    return load(elements);
  }
#else
  T elements[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) elements[i] = p[i];
  return load(elements);
#endif
}
template <typename T>
inline void store_first(T* p, Vec v, int64_t n) {
  T elements[kLanes];
  store(elements, v);
  for (int64_t i = 0; i < n; ++i) p[i] = elements[i];
}
template <typename T>
inline float load_one(const T* p) {
  if constexpr (std::is_same_v<T, float>) return *p;
  T elements[kLanes] = {};
  elements[0] = *p;
  return load(elements)[0];
}

// --- functions ---

// e^r for |r| up to ln 2/2.
inline Vec exp_of_remainder(Vec r) {
  Vec p = all(0.0013813391f);
  p = p * r + 0.00836878456f;
  p = p * r + 0.0416684113f;
  p = p * r + 0.166665196f;
  p = p * r + 0.49999994f;
  return p * (r * r) + r + 1.f;
}

// e^x within 1.5 units in the last place, down to the smallest denormal number.
inline Vec exp(Vec x) {
  constexpr float kLow = -104.f, kHigh = 88.7228f;
  // Adding 1.5·2^23 rounds to an integer, and leaves it in the low bits.
  constexpr float kRound = 12582912.f;
  const Vec bounded = clamp(x, kLow, kHigh);
  const Vec shifted = bounded * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  // ln 2 in two parts: the first times n is exact.
  const Vec r = bounded - n * 0.693359375f + n * 2.12194440e-4f;
  const Vec p = exp_of_remainder(r);
  // 2^n in two factors, because n can exceed the exponents of normal numbers on either side.
  const Ints exponent = bits<Ints>(shifted) - bits<int32_t>(kRound), half = exponent >> 1;
  const Vec result = p * bits<Vec>((half + 127) << 23) * bits<Vec>((exponent - half + 127) << 23);
  return x == x ? (x > kHigh ? all(__builtin_inff()) : result) : x;
}

// The same for x ≤ 0 (up to rounding), with zero for everything below −87; NaN stays NaN.
inline Vec exp_of_negative(Vec x) {
  constexpr float kRound = 12582912.f;
  const Vec shifted = x * 1.44269504f + kRound;
  const Vec n = shifted - kRound;
  const Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
  const Vec p = exp_of_remainder(r);
  const Vec result = p * bits<Vec>((bits<Ints>(shifted) - bits<int32_t>(kRound) + 127) << 23);
  return x < -87.f ? Vec{} : result;
}

// The standard normal distribution: its density φ(x) and its integral Φ(x) from −∞, so that
// gelu(x) = x·Φ(x) and gelu'(x) = Φ(x) + x·φ(x). With z = |x|/√2, Φ(−|x|) = e^(−z²)·erfcx(z)/2, and
// erfcx is a polynomial in 1/(1 + 0.3 z) to 2e-8: no cancellation in either tail.
struct Normal {
  Vec integral, density;
};
inline Normal normal(Vec x) {
  const Vec size = x < 0.f ? -x : x;
  const Vec t = 1.f / (size * 0.212132034f + 1.f);
  Vec p = all(-0.12951837f);
  p = p * t + 0.48554089f;
  p = p * t - 0.51223129f;
  p = p * t + 0.54766566f;
  p = p * t - 0.09461249f;
  p = p * t + 0.21490942f;
  p = p * t + 0.14834353f;
  p = p * t + 0.17071460f;
  p = p * t + 0.16918804f;
  const Vec e = exp(x * x * -0.5f);
  const Vec tail = e * (p * t) * 0.5f;
  return {x < 0.f ? tail : 1.f - tail, e * 0.398942280f};
}

// --- Philox-4x32-10, as in t2t_kernels/philox.py ---

// Product of the lower halves of a with a 32-bit number.
inline Longs wide_product(Longs a, uint32_t b) {
#if T2T_ISA >= T2T_AVX512
  return (Longs)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif T2T_ISA == T2T_AVX2
  return (Longs)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#else
  return (a & 0xffffffffull) * b;
#endif
}

// Writes `kept` if the number, 16 bits of a word, is at least `threshold`, else 0.
inline void dropout_factors(const Dropout& d, Longs words, float* to) {
  const Words word = bits<Words>(words), threshold = Words{} + d.threshold;
  const Vec low = (word & 0xffffu) >= threshold ? all(d.kept) : Vec{};
  const Vec high = (word >> 16) >= threshold ? all(d.kept) : Vec{};
#if T2T_ISA >= T2T_AVX512
  store(to,
        __builtin_shufflevector(low, high, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
  store(to + kLanes, __builtin_shufflevector(low, high, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                             29, 14, 30, 15, 31));
#elif T2T_ISA == T2T_AVX2
  store(to, __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11));
  store(to + kLanes, __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15));
#else
  store(to, __builtin_shufflevector(low, high, 0, 4, 1, 5));
  store(to + kLanes, __builtin_shufflevector(low, high, 2, 6, 3, 7));
#endif
}

// Writes the factors of elements [8·block, 8·(block + kLanes/2)). Each 64-bit lane computes a block
// of eight elements in its lower half.
inline void dropout_blocks(const Dropout& d, uint64_t block, float* to) {
  constexpr int kBlocks = kLanes / 2;
  Longs c0;
  for (int i = 0; i < kBlocks; ++i) c0[i] = block + i;
  Longs c1 = c0 >> 32, c2 = Longs{} + static_cast<uint64_t>(d.site), c3 = Longs{};
  auto k0 = static_cast<uint32_t>(d.seed), k1 = static_cast<uint32_t>(d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const Longs p0 = wide_product(c0, 0xD2511F53u), p1 = wide_product(c2, 0xCD9E8D57u);
    c0 = (p1 >> 32) ^ c1 ^ static_cast<uint64_t>(k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ static_cast<uint64_t>(k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  const Longs low = (c0 & 0xffffffffull) | (c1 << 32), high = (c2 & 0xffffffffull) | (c3 << 32);
#if T2T_ISA >= T2T_AVX512
  const Longs even = __builtin_shufflevector(low, high, 0, 8, 1, 9, 2, 10, 3, 11);
  const Longs odd = __builtin_shufflevector(low, high, 4, 12, 5, 13, 6, 14, 7, 15);
#elif T2T_ISA == T2T_AVX2
  const Longs even = __builtin_shufflevector(low, high, 0, 4, 1, 5);
  const Longs odd = __builtin_shufflevector(low, high, 2, 6, 3, 7);
#else
  const Longs even = __builtin_shufflevector(low, high, 0, 2);
  const Longs odd = __builtin_shufflevector(low, high, 1, 3);
#endif
  dropout_factors(d, even, to);
  dropout_factors(d, odd, to + 2 * kLanes);
}

}  // namespace
}  // namespace t2t
