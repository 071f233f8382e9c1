// The loops for binary codes of one instruction set. Included once by each.
#pragma once

#include "binary.hpp"
#include "binary_group.hpp"
#include "binary_search.hpp"
#include "binary_sweep.hpp"

namespace optgptq {
namespace OPTGPTQ_PATH {
namespace {

template <class T>
BinaryPath<T> binary_path() {
  return {
      Lanes<T>::count,        binary::search_bytes<T>, binary::search_tile<T>, binary::group_bytes<T>,
      binary::group_tile<T>, binary::sweep_bytes<T>,  binary::sweep_tile<T>,  binary::nearest_tile<T>};
}

}  // namespace

BinaryPath<float> binary_float() { return binary_path<float>(); }
BinaryPath<double> binary_double() { return binary_path<double>(); }

}  // namespace OPTGPTQ_PATH
}  // namespace optgptq
