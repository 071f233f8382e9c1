// What lies between products, for any processor.
#include "leaves.hpp"

#define OPTGPTQ_PATH portable
#define OPTGPTQ_VECTOR_BYTES 16
#include "leaves_path.hpp"
