// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
// A random number here is a pure function of (seed, uid, t, stream): nothing depends on batch slots or call order.
#pragma once
#include "common/hd.h"

namespace pymathrl {

struct Philox4 {
  uint32_t x[4];
};

HD Philox4 philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0;
    uint64_t p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
    uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The uniform of token t of sample uid, in the open interval (0, 1): 24 bits and half a step, so never 0 and never 1.
// Double, because those are 25 bits: in fp32 the largest of them rounds to 1, once in 2^24 draws.
HD double philox_uniform(uint64_t seed, uint64_t uid, uint32_t t, uint32_t stream) {
  Philox4 r = philox4x32_10(t, static_cast<uint32_t>(uid), static_cast<uint32_t>(uid >> 32), stream,
                            static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
  return (static_cast<double>(r.x[0] >> 8) + 0.5) * 5.9604644775390625e-8;  // 2^-24
}

}  // namespace pymathrl
