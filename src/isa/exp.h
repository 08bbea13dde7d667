// The exponential function in the SIMD vocabulary. Include it from a source that for_each_isa.h compiles: without an
// include guard, once per instruction set.

namespace kvpack::KVPACK_ISA {
namespace {

/// exp(x) for x <= 0, within 2 units in the last place; below -87 the result is 0. Cephes' polynomial.
inline F32 exp_nonpositive(F32 x) {
  const Mask vanishes = le(x, set1(-87.0f));
  const F32 clamped = max(x, set1(-87.0f));
  const F32 n = round_even(mul(clamped, set1(1.44269504088896341f)));
  F32 r = fma(n, set1(-0.693359375f), clamped);
  r = fma(n, set1(2.12194440e-4f), r);
  F32 p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return blend(vanishes, set1(0.0f), mul(p, exp2_whole(n)));
}

}  // namespace
}  // namespace kvpack::KVPACK_ISA
