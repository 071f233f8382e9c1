// Products with weights in binary coding for any processor: vectors of 16 bytes, which the compiler turns into what there is.
#include <cstddef>
#include <cstdint>

#include "binary_products.hpp"
#define OPTGPTQ_PATH portable
#define OPTGPTQ_VECTOR_BYTES 16
#include "binary_products_path.hpp"
