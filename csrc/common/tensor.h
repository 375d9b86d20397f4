// How a tensor crosses from Python: pointer, dtype, sizes, strides, device. The checks live here and nowhere else.
#pragma once
#include <cstdint>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>

namespace pymathrl {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, i64 = 3, u8 = 4, i32 = 5, i8 = 6, f64 = 7 };

inline const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::i64: return "int64";
    case DType::u8: return "uint8 or bool";
    case DType::i32: return "int32";
    case DType::i8: return "int8";
    case DType::f64: return "float64";
  }
  return "unknown";
}

constexpr int kMaxDims = 4;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  int ndim = 0;
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements
  int device = -1;                // -1 = CPU, else the CUDA device index
};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());  // becomes ValueError
}

inline std::string shape_text(const int64_t* size, int ndim) {
  std::string text = "[";
  for (int d = 0; d < ndim; ++d) text += (d ? ", " : "") + std::to_string(size[d]);
  return text + "]";
}

template <class T> struct dtype_of;
template <> struct dtype_of<float> { static constexpr DType value = DType::f32; };
template <> struct dtype_of<double> { static constexpr DType value = DType::f64; };
template <> struct dtype_of<int64_t> { static constexpr DType value = DType::i64; };
template <> struct dtype_of<uint8_t> { static constexpr DType value = DType::u8; };
template <> struct dtype_of<int32_t> { static constexpr DType value = DType::i32; };

// The checks of one call: every message names the op, the argument, what was expected, what came, and what to do.
class Args {
 public:
  Args(const char* op, const Tensor& first) : op_(op), device_(first.device) {}

  int device() const { return device_; }
  bool cuda() const { return device_ >= 0; }

  // A dense (contiguous) tensor of `dtype` with exactly these sizes, on the op's device.
  void* dense(const char* name, const Tensor& t, DType dtype, std::initializer_list<int64_t> sizes) const {
    check_dtype(name, t, dtype);
    check_place(name, t);
    bool same = t.ndim == static_cast<int>(sizes.size());
    int d = 0;
    for (int64_t size : sizes) {
      if (!same) break;
      same = t.size[d++] == size;
    }
    if (!same)
      fail(op_, ": ", name, " must have shape ", shape_text(sizes.begin(), static_cast<int>(sizes.size())), ", got ",
           shape_text(t.size, t.ndim));
    int64_t expected = 1;
    for (d = 0; d < t.ndim; ++d)
      if (t.size[d] == 0) return t.data;  // no element: any strides are contiguous
    for (d = t.ndim - 1; d >= 0; --d) {
      if (t.size[d] != 1 && t.stride[d] != expected)
        fail(op_, ": ", name, " must be contiguous; call .contiguous() on it");
      expected *= t.size[d];
    }
    return t.data;
  }
  template <class T>
  T* dense(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) const {
    return static_cast<T*>(dense(name, t, dtype_of<T>::value, sizes));
  }

  // The same, or nullptr where the caller gave none.
  void* optional(const char* name, const Tensor* t, DType dtype, std::initializer_list<int64_t> sizes) const {
    return t ? dense(name, *t, dtype, sizes) : nullptr;
  }
  template <class T>
  T* optional(const char* name, const Tensor* t, std::initializer_list<int64_t> sizes) const {
    return t ? dense<T>(name, *t, sizes) : nullptr;
  }

  // The dtype of activations and weights, taken from one of them: fp32, on a GPU also bf16.
  DType activation_dtype(const char* name, const Tensor& t) const {
    if (t.dtype != DType::f32 && !(cuda() && t.dtype == DType::bf16))
      fail(op_, ": ", name, " must be float32", cuda() ? " or bfloat16" : " on a CPU", ", got ", dtype_name(t.dtype),
           "; convert it with .to()");
    return t.dtype;
  }

  // A matrix whose rows are contiguous but may be apart: returns the row stride in elements.
  int64_t rows(const char* name, const Tensor& t) const {
    check_place(name, t);
    if (t.ndim != 2) fail(op_, ": ", name, " must have 2 dimensions, got shape ", shape_text(t.size, t.ndim));
    if (t.size[1] > 1 && t.stride[1] != 1)
      fail(op_, ": the rows of ", name, " must be contiguous, got stride ", t.stride[1], "; call .contiguous() on it");
    return t.stride[0];
  }

  void check_dtype(const char* name, const Tensor& t, DType expected) const {
    if (t.dtype != expected)
      fail(op_, ": ", name, " must be ", dtype_name(expected), ", got ", dtype_name(t.dtype), "; convert it with .to()");
  }

  void check_place(const char* name, const Tensor& t) const {
    if (t.device != device_)
      fail(op_, ": ", name, " must be on ", place(device_), " like the first argument, got ", place(t.device));
  }

  // True: run the CUDA twin. Raises where the tensors are on a GPU and the extension was built without nvcc.
  bool use_cuda() const {
#ifdef PYMATHRL_CUDA
    return cuda();
#else
    if (cuda()) fail(op_, ": tensors are on ", place(device_), " but pymathrl was built without CUDA; install nvcc and rebuild");
    return false;
#endif
  }

 private:
  static std::string place(int device) { return device < 0 ? "cpu" : "cuda:" + std::to_string(device); }
  const char* op_;
  int device_;
};

}  // namespace pymathrl
