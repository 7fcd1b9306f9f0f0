// The errors that the core throws. Each becomes the Python class of the same name in
// tinyvllm.errors, and from there an exit code.
//
// A message says what is wrong, where, with the numbers, and one thing to try, in one line.
#pragma once

#include <stdexcept>

namespace tinyvllm {

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A model file is missing, damaged, hostile, or changed while it was in use.
class CheckpointError : public Error {
 public:
  using Error::Error;
};

// The checkpoint is sound, but asks for something that this engine does not implement.
class UnsupportedModelError : public Error {
 public:
  using Error::Error;
};

// The model, its KV cache or a request is larger than the memory that it may use. Where a model does
// not fit, a table follows the line: what takes how much.
class CapacityError : public Error {
 public:
  using Error::Error;
};

// The device that was asked for is missing or cannot be used. What fails while it is used is an Error.
class DeviceError : public Error {
 public:
  using Error::Error;
};

// A prompt, an option or a combination of options cannot be served as it stands.
class InvalidRequestError : public Error {
 public:
  using Error::Error;
};

}  // namespace tinyvllm
