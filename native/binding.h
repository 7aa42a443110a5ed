// What the sources of the Python module share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "kernels.h"

namespace lmclock {

namespace nb = nanobind;

using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;
using FloatsIn = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;

struct Free {
  void operator()(uint8_t* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<uint8_t, Free>;  // 64-byte aligned

Buffer allocate(int64_t bytes);

// ValueError with the message, unless ok.
void require(bool ok, const std::string& message);

// The kernels of a path by name, the widest for none; ValueError names the valid ones.
const Kernels& find_path(const std::optional<std::string>& path);

// The calibration kernel of an arithmetic kind; ValueError names the valid ones.
using Peak = int64_t (*)(int64_t rounds);
Peak find_peak(const Kernels& kernels, const std::string& kind);

struct Packed {
  Matrix m;
  Buffer data;
  bool finite = true;
  const Kernels* kernels = nullptr;
};

// Activation records of x, or x itself.
struct RoundedRows {
  Rows rows;
  Buffer data;
  int64_t count = 0;
};

RoundedRows round_rows(const Kernels& kernels, const std::string& act, FloatsIn x, int64_t width);

void bind_kernels(nb::module_& m);
void bind_timing(nb::module_& m);
void bind_machine(nb::module_& m);

}  // namespace lmclock
