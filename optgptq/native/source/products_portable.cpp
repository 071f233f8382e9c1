// Products with weights in codes for any processor: vectors of 16 bytes, which the compiler turns into what there is.
#include <cstddef>
#include <cstdint>

#include "products.hpp"
#define OPTGPTQ_PATH portable
#define OPTGPTQ_VECTOR_BYTES 16
#include "products_path.hpp"
