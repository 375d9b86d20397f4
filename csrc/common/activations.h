// Activations that several ops share, branch-free. F: float or f32x16 (common/simd.h); the bits are the same in both.
#pragma once
#include "common/row_softmax.h"

namespace pymathrl {

// s(x) and 1 - s(x) = s(-x), both to full relative precision: a difference from 1 would have no digit left at x = 17.
// The exponential is of -|x|: no overflow.
template <class F> struct Sigmoid {
  F s, rest;
};
template <class F> HD Sigmoid<F> sigmoid(F x) {
  F e = exp_row(as_float(as_bits(x) | 0x80000000u));
  F of_positive = 1.0f / (e + 1.0f), of_negative = e * of_positive;
  return {pick(x < 0.0f, of_negative, of_positive), pick(x < 0.0f, of_positive, of_negative)};
}

// silu(x) = x s(x) and its slope s(x) (1 + x s(-x)).
template <class F> HD F silu(F x) { return x * sigmoid(x).s; }
template <class F> HD F silu_slope(F x) {
  const Sigmoid<F> sigma = sigmoid(x);
  return sigma.s * (x * sigma.rest + 1.0f);
}

// ln(1 + e^x) = max(x, 0) + ln(1 + e), e = e^-|x| in (0, 1], and its slope is s(x). ln(1 + e) = 2 artanh(e / (2 + e)):
// the series in the square of that, at most 1/9, has a term of 2e-9 after the eight that are added. From x = 17 on it is
// x in fp32 by itself, which is what a threshold at 20 (torch, mamba-ssm) says; below -87 it is 0.
template <class F> HD F softplus(F x) {
  F e = exp_row(as_float(as_bits(x) | 0x80000000u));
  F s = e / (e + 2.0f), square = s * s;
  F p = square * (1.0f / 15.0f) + (1.0f / 13.0f);
  p = p * square + (1.0f / 11.0f);
  p = p * square + (1.0f / 9.0f);
  p = p * square + (1.0f / 7.0f);
  p = p * square + (1.0f / 5.0f);
  p = p * square + (1.0f / 3.0f);
  p = p * square + 1.0f;
  return pick(x > 0.0f, x, 0.0f) + (s + s) * p;
}

}  // namespace pymathrl
