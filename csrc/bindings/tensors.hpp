// A tensor of PyTorch's, looked at without a header of torch.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "python.hpp"

namespace metafast {

// DLTensor of DLPack 1.x (github.com/dmlc/dlpack, dlpack.h), whose layout its ABI fixes: an array where it lies.
struct View {
  struct Device {
    int32_t type, id;
    bool operator==(const Device&) const = default;
  };
  struct Type {
    uint8_t code, bits;
    uint16_t lanes;
    bool operator==(const Type&) const = default;
  };

  void* data;
  Device device;
  int32_t dims;
  Type type;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t offset;   // of the first element behind data, in bytes

  int64_t address() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data) + offset); }
  bool contiguous() const;
};

// The tensor as a view, which lives as long as nobody changes the tensor. False where there is none to be had: of a
// subclass, a layout that is not strided, a tensor of a transform, or where torch is too old to offer views (2.8).
bool view(PyObject* tensor, View* made);

// What a new array is like.
struct Shape {
  std::vector<int64_t> sizes, strides;  // the latter in elements, with no gaps between them
  View::Type type;
  int64_t bytes() const;
};

// The memory of a new array, anything in it, until a tensor takes it over. That is done in half the time in which torch
// makes an empty tensor, for nothing is dispatched, and only for those arrays that anybody asks for.
class Block {
 public:
  explicit Block(const Shape& shape);
  void* data() const;
  py::object to_tensor() &&;

 private:
  struct Managed;
  struct Free {
    void operator()(Managed* managed) const noexcept;
  };
  std::unique_ptr<Managed, Free> managed_;
};

// Of a tensor that has a view: what the view does not show.
bool requires_grad(PyObject* tensor);
bool made_in_inference_mode(PyObject* tensor);
bool negated(PyObject* tensor);  // a sign that is not in memory

}  // namespace metafast
