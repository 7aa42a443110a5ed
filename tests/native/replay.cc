// The native machine without Python: repeats on every SIMD path what tests/recorder.py wrote down
// while the tests ran, and compares each value that they read.
//
//   pytest -p tests.recorder --record=build/machine.rec tests/test_native_machine.py
//   build/drivers/replay build/machine.rec [PATH]
//
// Numbers must agree within a normalised mean square error of 1e-7, ids exactly. The recorded ones
// are those of path scalar, which the tests hold to the array machine.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>

#include "../../native/machine.h"

namespace {

using namespace lmclock;

// As in tests/recorder.py.
enum Message : int64_t { kTest, kMake, kLoad, kBind, kRun, kCommit, kCopy, kRead, kWrite };

class File {
 public:
  explicit File(const char* path) : file_(std::fopen(path, "rb")) {
    if (!file_) fail(std::string("cannot open ") + path);
  }
  ~File() { std::fclose(file_); }
  [[noreturn]] static void fail(const std::string& what) {
    std::printf("%s\n", what.c_str());
    std::exit(1);
  }

  bool more(int64_t& kind) { return std::fread(&kind, 8, 1, file_) == 1; }
  int64_t number() {
    int64_t n;
    get(&n, 8);
    return n;
  }
  // Bytes that stay until `forget`; null where none were given.
  template <class T>
  Span<T> array() {
    const int64_t size = number();
    if (size < 0) return {};
    kept_.emplace_back(new uint8_t[static_cast<size_t>(size) + 1]);
    get(kept_.back().get(), static_cast<size_t>(size));
    return {reinterpret_cast<const T*>(kept_.back().get()),
            size / static_cast<int64_t>(sizeof(T))};
  }
  void forget() { kept_.clear(); }

 private:
  void get(void* to, size_t size) {
    if (size && std::fread(to, size, 1, file_) != 1) fail("the recording is cut off");
  }
  std::FILE* file_;
  std::vector<std::unique_ptr<uint8_t[]>> kept_;
};

void load(File& file, Machine& machine) {
  ProgramSource source;
  for (int64_t n = file.number(); n > 0; --n) {
    WeightSource w;
    w.name = "weight " + std::to_string(source.weights.size());
    w.format = static_cast<int32_t>(file.number());
    w.rows = file.number();
    w.width = file.number();
    const Span<uint8_t> data = file.array<uint8_t>();
    w.data = data.data;
    w.row_bytes = w.rows ? data.size / w.rows : 0;
    w.vector = file.array<float>().data;
    source.weights.push_back(w);
  }
  for (int64_t n = file.number(); n > 0; --n) {
    const Span<isa::Instruction> code = file.array<isa::Instruction>();
    const Span<ValueSource> values = file.array<ValueSource>();
    source.sections.push_back({code.data, code.size, values.data, values.size});
  }
  for (int64_t n = file.number(); n > 0; --n) {
    int32_t f[8];
    for (int32_t& v : f) v = static_cast<int32_t>(file.number());
    source.states.push_back({f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]});
  }
  source.inputs = file.number();
  source.slots = file.number();
  const int64_t rows = file.number(), picks = file.number(), slots = file.number();
  source.capacity = {rows, picks, slots, file.number()};
  machine.load(source);
}

void bind(File& file, Machine& machine) {
  BatchSource b;
  for (BatchSource::Rows* rows : {&b.tok, &b.src}) {
    rows->starts = file.array<int32_t>();
    rows->positions = file.array<int32_t>();
    rows->valid = file.array<uint8_t>();
  }
  for (int64_t n = file.number(); n > 0; --n) b.inputs.push_back(file.array<uint8_t>());
  b.slots = file.array<int32_t>();
  for (int64_t n = file.number(); n > 0; --n) {
    std::vector<Span<int32_t>>& tables = b.pages.emplace_back();
    for (int64_t s = file.number(); s > 0; --s) tables.push_back(file.array<int32_t>());
    b.lengths.push_back(file.array<int32_t>());
  }
  b.pick = file.array<int32_t>();
  b.sampling = file.array<uint8_t>();
  b.adjust = file.array<uint8_t>();
  machine.bind(b);
}

struct Test {
  const char* path;
  std::string name;
  int64_t reads = 0;
};

// The value as it was recorded, within the tolerance.
void compare(File& file, const Machine& machine, Test& test) {
  const int section = static_cast<int>(file.number()), value = static_cast<int>(file.number());
  const int64_t rows = file.number(), width = file.number();
  const Span<float> want = file.array<float>();
  const Machine::View got = machine.view(section, value);
  const std::string where = test.name + " on " + test.path + ": value " + std::to_string(value);
  if (!got.data || got.rows != rows || got.width != width) File::fail(where + " is not there");
  double error = 0, power = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const float *a = got.data + r * got.stride, *b = want.data + r * width;
    const size_t bytes = 4 * static_cast<size_t>(width);
    if (got.ids && std::memcmp(a, b, bytes)) File::fail(where + " has other ids");
    for (int64_t k = 0; k < width && !got.ids; ++k) {
      if (!std::isfinite(b[k]) && std::memcmp(a + k, b + k, 4) && !(a[k] != a[k] && b[k] != b[k]))
        File::fail(where + " is not infinite where it should be");
      if (!std::isfinite(b[k])) continue;
      error += (double{a[k]} - b[k]) * (double{a[k]} - b[k]);
      power += double{b[k]} * b[k];
    }
  }
  if (!(error <= 1e-7 * power)) File::fail(where + ": error " + std::to_string(error / power));
  ++test.reads;
}

void write(File& file, const Machine& machine, const Test& test) {
  const int section = static_cast<int>(file.number()), value = static_cast<int>(file.number());
  const Span<float> from = file.array<float>();
  const Machine::View to = machine.view(section, value);
  if (!to.data || to.rows * to.width != from.size) File::fail(test.name + ": cannot write");
  for (int64_t r = 0; r < to.rows; ++r)
    std::memcpy(to.data + r * to.stride, from.data + r * to.width,
                4 * static_cast<size_t>(to.width));
}

void run(File& file, Machine& machine, const Test& test) {
  const int section = static_cast<int>(file.number());
  const int64_t first = file.number(), last = file.number(), fault = file.number();
  std::vector<int64_t> stamps(static_cast<size_t>(2 * (last - first) * machine.threads()));
  const RunFault got = machine.run(section, first, last, stamps.data());
  if (static_cast<int64_t>(got.fault) != fault) File::fail(test.name + ": another fault");
}

void replay(const char* path, const Kernels& kernels) {
  File file(path);
  Test test = {kernels.name, "", 0};
  std::map<int64_t, std::unique_ptr<Machine>> machines;
  for (int64_t kind; file.more(kind); file.forget()) {
    if (kind == kTest) {
      const Span<char> name = file.array<char>();
      test.name.assign(name.data, static_cast<size_t>(name.size));
      machines.clear();
      continue;
    }
    std::unique_ptr<Machine>& machine = machines[file.number()];
    if (kind == kMake) machine.reset(new Machine(static_cast<int>(file.number()), &kernels));
    else if (!machine) File::fail("the recording uses a machine that was not made");
    else if (kind == kLoad) load(file, *machine);
    else if (kind == kBind) bind(file, *machine);
    else if (kind == kRun) run(file, *machine, test);
    else if (kind == kCommit) machine->commit();
    else if (kind == kRead) compare(file, *machine, test);
    else if (kind == kWrite) write(file, *machine, test);
    else if (kind == kCopy) {
      const int state = static_cast<int>(file.number());
      const Span<int32_t> pairs = file.array<int32_t>();
      machine->copy(state, pairs.data, pairs.size / 2);
    } else File::fail("message " + std::to_string(kind) + " is unknown");
  }
  std::printf("%s: %lld values as recorded\n", kernels.name, static_cast<long long>(test.reads));
  std::fflush(stdout);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2 && count != 3) File::fail("usage: replay RECORDING [PATH]");
  try {
    if (count == 2) {
      for (const Kernels* kernels : available_kernels()) replay(arguments[1], *kernels);
    } else if (const Kernels* kernels = select_kernels(arguments[2])) {
      replay(arguments[1], *kernels);
    } else {
      File::fail(std::string("this build or processor has no path ") + arguments[2]);
    }
  } catch (const Failure& failure) {
    File::fail(failure.message);
  }
}
