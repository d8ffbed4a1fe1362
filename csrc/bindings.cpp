// The Python module t2t_kernels._C. Importing it registers the CPU operators of this library with
// torch. It only exports information about the build.

#include <string>

#include <pybind11/pybind11.h>

#include <torch/headeronly/version.h>

#include "cpu/isa.h"

namespace {

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = T2T_COMPILER;
  info["torch"] = TORCH_VERSION;
  // Empty if the CUDA library was not built, else in the format of TORCH_CUDA_ARCH_LIST.
  info["cuda_architectures"] = T2T_CUDA_ARCHITECTURES;
  return info;
}

// The instruction set of the CPU kernels in this process; an error if T2T_CPU_ISA is invalid.
std::string cpu_isa() { return t2t::kernels().name; }

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels and build information of t2t_kernels.";
  module.def("build_info", &build_info, "Compiler, torch and CUDA architectures of this build.");
  module.def("cpu_isa", &cpu_isa, "Instruction set of the CPU kernels: the CPU's, or T2T_CPU_ISA.");
}
