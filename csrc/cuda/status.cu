#include <cuda_runtime_api.h>

#include "rows.h"

extern "C" const char* fd_error_text(int status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}
