#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "causal_conv1d.h"
#include "common/tensor.h"
#include "linear.h"
#include "mamba_step.h"
#include "rms_norm.h"
#include "rotary.h"
#include "row_kernels.h"
#include "selective_scan.h"
#include "ssd.h"
#include "swiglu.h"

// The files of PYMATHRL_LEVEL_OPS (CMakeLists.txt) are compiled once per processor level, each into the namespace of its
// level; here the level is chosen, once, when the first kernel runs.
namespace pymathrl {

namespace base {
extern const RowKernels kernels;
}
#ifdef PYMATHRL_X86_LEVELS
namespace v3 {
extern const RowKernels kernels;
}
namespace v4 {
extern const RowKernels kernels;
}
#endif

namespace {

struct Level {
  const char* name;
  const RowKernels* kernels;
  bool available;
};

Level choose() {
#ifdef PYMATHRL_X86_LEVELS
  __builtin_cpu_init();
  const Level levels[] = {{"v4", &v4::kernels, __builtin_cpu_supports("x86-64-v4") != 0},
                          {"v3", &v3::kernels, __builtin_cpu_supports("x86-64-v3") != 0},
                          {"base", &base::kernels, true}};
#else
  const Level levels[] = {{"base", &base::kernels, true}};
#endif
  const char* wanted = std::getenv("PYMATHRL_SIMD");
  for (const Level& level : levels)
    if (level.available && (!wanted || !*wanted || std::strcmp(wanted, level.name) == 0)) return level;
  fail("PYMATHRL_SIMD must be a level that this processor has (base, v3 = AVX2, v4 = AVX-512), got '", wanted, "'");
}

const Level& level() {
  static const Level chosen = choose();
  return chosen;
}

}  // namespace

// op(p) runs the op of the chosen level.
#ifdef PYMATHRL_X86_LEVELS
#define BY_LEVEL(op, Params)                                                                          \
  namespace base { void op(const Params& p); }                                                        \
  namespace v3 { void op(const Params& p); }                                                          \
  namespace v4 { void op(const Params& p); }                                                          \
  void op(const Params& p) {                                                                          \
    static const auto run = level().name[0] == 'b' ? base::op : level().name[1] == '3' ? v3::op : v4::op; \
    run(p);                                                                                           \
  }
#else
#define BY_LEVEL(op, Params)                     \
  namespace base { void op(const Params& p); }   \
  void op(const Params& p) { base::op(p); }
#endif

BY_LEVEL(attention_cpu, AttentionParams)
BY_LEVEL(attention_backward_cpu, AttentionParams)
BY_LEVEL(paged_attention_cpu, PagedAttentionParams)
BY_LEVEL(causal_conv1d_cpu, CausalConv1dParams)
BY_LEVEL(causal_conv1d_backward_cpu, CausalConv1dGradParams)
BY_LEVEL(mamba_step_cpu, MambaStepParams)
BY_LEVEL(rms_norm_cpu, RmsNormParams)
BY_LEVEL(rms_norm_backward_cpu, RmsNormGradParams)
BY_LEVEL(rotary_cpu, RotaryParams)
BY_LEVEL(rotary_backward_cpu, RotaryGradParams)
BY_LEVEL(selective_scan_cpu, SelectiveScanParams)
BY_LEVEL(selective_scan_backward_cpu, SelectiveScanGradParams)
BY_LEVEL(ssd_scan_cpu, SsdScanParams)
BY_LEVEL(ssd_scan_backward_cpu, SsdGradParams)
BY_LEVEL(ssd_step_cpu, SsdStepParams)
BY_LEVEL(swiglu_cpu, SwigluParams)
BY_LEVEL(swiglu_backward_cpu, SwigluGradParams)

BY_LEVEL(linear_cpu, LinearParams)

const RowKernels& row_kernels() { return *level().kernels; }
const char* simd_level() { return level().name; }

}  // namespace pymathrl
