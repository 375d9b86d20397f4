// The only file that knows Python. Each op: check the arguments, fill its Params, release the GIL, run CPU or CUDA.
#include <pybind11/pybind11.h>

#include "common/parallel.h"
#include "common/tensor.h"
#include "group_advantage.h"

namespace py = pybind11;
using namespace pymathrl;

namespace {

Tensor make_tensor(uintptr_t data, int dtype, const py::tuple& sizes, const py::tuple& strides, int device) {
  Tensor t;
  if (sizes.size() > kMaxDims) fail("a tensor has ", sizes.size(), " dimensions; ops take at most ", kMaxDims);
  t.data = reinterpret_cast<void*>(data);
  t.dtype = static_cast<DType>(dtype);
  t.ndim = static_cast<int>(sizes.size());
  for (int d = 0; d < t.ndim; ++d) {
    t.size[d] = sizes[d].cast<int64_t>();
    t.stride[d] = strides[d].cast<int64_t>();
  }
  t.device = device;
  return t;
}

void* stream_handle(uintptr_t stream) { return reinterpret_cast<void*>(stream); }

void group_advantage(const Tensor& reward, const Tensor& offsets, const Tensor* baseline, const Tensor* tokens,
                     const Tensor& advantage, const Tensor& equal, int centre, int scale, float eps, int ddof,
                     uintptr_t stream) {
  Args args("group_advantage", reward);
  int64_t samples = reward.size[0], groups = equal.size[0];
  GroupAdvantageParams p{};
  p.reward = args.dense<float>("reward", reward, {samples});
  p.offsets = args.dense<int64_t>("offsets", offsets, {groups + 1});
  p.baseline = args.optional<float>("baseline", baseline, {samples});
  p.tokens = args.optional<int64_t>("tokens", tokens, {samples});
  p.advantage = args.dense<float>("advantage", advantage, {samples});
  p.equal = args.dense<uint8_t>("equal", equal, {groups});
  p.groups = groups;
  p.samples = samples;
  p.centre = static_cast<Centre>(centre);
  p.scale = static_cast<Scale>(scale);
  p.eps = eps;
  p.ddof = ddof;
  if (p.centre == Centre::baseline && !p.baseline) fail("group_advantage: centre 'baseline' needs baseline [B], got None");
  if (p.scale == Scale::token_whiten && !p.tokens) fail("group_advantage: scale 'token_whiten' needs tokens [B], got None");
  py::gil_scoped_release release;
#ifdef PYMATHRL_CUDA
  if (args.use_cuda()) return group_advantage_cuda(p, args.device(), stream_handle(stream));
#endif
  args.use_cuda();
  (void)stream;
  group_advantage_cpu(p);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The kernels of pymathrl. Call them through pymathrl.ops, which checks, allocates and differentiates.";
#ifdef PYMATHRL_CUDA
  m.attr("has_cuda") = true;
#else
  m.attr("has_cuda") = false;
#endif
  m.def("parallel_runtime", &parallel_runtime, "The OpenMP runtime in use: a path, or why there is none.");
  py::class_<Tensor>(m, "Tensor", "Pointer, dtype, sizes, strides (in elements) and device (-1 = CPU) of a tensor.")
      .def(py::init(&make_tensor), py::arg("data"), py::arg("dtype"), py::arg("sizes"), py::arg("strides"),
           py::arg("device"));

  m.def("group_advantage", &group_advantage, py::arg("reward"), py::arg("offsets"), py::arg("baseline"),
        py::arg("tokens"), py::arg("advantage"), py::arg("equal"), py::arg("centre"), py::arg("scale"), py::arg("eps"),
        py::arg("ddof"), py::arg("stream"));
}
