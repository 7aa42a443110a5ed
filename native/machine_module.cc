// The native machine as a Python class; lmclock/machines/native.py is the contract around it.

#include <cstring>

#include "binding.h"
#include "machine.h"

namespace lmclock {

namespace {

// Memory of Python arrays for the time of a call. Arrays are C-contiguous and of the right type:
// native.py sees to it.
class Views {
 public:
  Views() = default;
  Views(const Views&) = delete;
  ~Views() {
    for (Py_buffer& b : held_) PyBuffer_Release(&b);
  }

  template <class T>
  Span<T> get(nb::handle array) {
    if (!array.is_valid() || array.is_none()) return {};
    Py_buffer& b = held_.emplace_back();
    if (PyObject_GetBuffer(array.ptr(), &b, PyBUF_SIMPLE) != 0) {
      held_.pop_back();
      throw nb::python_error();
    }
    return {static_cast<const T*>(b.buf), b.len / static_cast<Py_ssize_t>(sizeof(T))};
  }

  BatchSource::Rows rows(nb::handle parts) {
    if (parts.is_none()) return {};
    nb::tuple t = nb::borrow<nb::tuple>(parts);
    return {get<int32_t>(t[0]), get<int32_t>(t[1]), get<uint8_t>(t[2])};
  }

 private:
  std::vector<Py_buffer> held_;
};

template <class T, class F>
std::vector<T> each(nb::handle list, F&& make) {
  std::vector<T> out;
  for (nb::handle item : list) out.push_back(make(item));
  return out;
}

void load(Machine& machine, nb::list weights, nb::list sections, nb::list states, nb::tuple sizes) {
  Views views;
  ProgramSource source;
  source.weights = each<WeightSource>(weights, [&](nb::handle item) {
    nb::tuple t = nb::borrow<nb::tuple>(item);
    WeightSource w;
    w.name = nb::cast<std::string>(t[0]);
    w.format = nb::cast<int32_t>(t[1]);
    w.rows = nb::cast<int64_t>(t[2]);
    w.width = nb::cast<int64_t>(t[3]);
    const Span<uint8_t> data = views.get<uint8_t>(t[4]);
    w.data = data.data;
    w.row_bytes = w.rows ? data.size / w.rows : 0;
    w.vector = views.get<float>(t[5]).data;
    return w;
  });
  source.sections = each<SectionSource>(sections, [&](nb::handle item) {
    nb::tuple t = nb::borrow<nb::tuple>(item);
    const Span<isa::Instruction> code = views.get<isa::Instruction>(t[0]);
    const Span<ValueSource> values = views.get<ValueSource>(t[1]);
    return SectionSource{code.data, code.size, values.data, values.size};
  });
  source.states = each<StateSource>(states, [&](nb::handle item) {
    nb::tuple t = nb::borrow<nb::tuple>(item);
    int32_t n[8];
    for (size_t k = 0; k < 8; ++k) n[k] = nb::cast<int32_t>(t[k]);
    return StateSource{n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7]};
  });
  source.inputs = nb::cast<int64_t>(sizes[0]);
  source.slots = nb::cast<int64_t>(sizes[1]);
  source.capacity = {nb::cast<int64_t>(sizes[2]), nb::cast<int64_t>(sizes[3]),
                     nb::cast<int64_t>(sizes[4]), nb::cast<int64_t>(sizes[5])};
  nb::gil_scoped_release unlocked;
  machine.load(source);
}

void bind(Machine& machine, nb::handle tok, nb::handle src, nb::handle inputs, nb::handle slots,
          nb::handle pages, nb::handle lengths, nb::handle pick, nb::handle sampling,
          nb::handle adjust) {
  Views views;
  BatchSource batch;
  batch.tok = views.rows(tok);
  batch.src = views.rows(src);
  batch.inputs = each<Span<uint8_t>>(inputs, [&](nb::handle x) { return views.get<uint8_t>(x); });
  batch.slots = views.get<int32_t>(slots);
  batch.pages = each<std::vector<Span<int32_t>>>(pages, [&](nb::handle tables) {
    return each<Span<int32_t>>(tables, [&](nb::handle x) { return views.get<int32_t>(x); });
  });
  batch.lengths = each<Span<int32_t>>(lengths, [&](nb::handle x) { return views.get<int32_t>(x); });
  batch.pick = views.get<int32_t>(pick);
  batch.sampling = views.get<uint8_t>(sampling);
  batch.adjust = views.get<uint8_t>(adjust);
  machine.bind(batch);
}

using Table = nb::ndarray<nb::numpy, int64_t, nb::ndim<3>>;

// (begin, end, stamps, fault): stamps (instructions, threads, 2), fault None or (kind, instruction,
// value, limit).
nb::object run(Machine& machine, int section, int64_t first, int64_t last) {
  const size_t n = static_cast<size_t>(last - first);
  const size_t threads = static_cast<size_t>(machine.threads());
  int64_t* stamps = new int64_t[2 * n * threads + 1]();
  nb::capsule owner(stamps, [](void* p) noexcept { delete[] static_cast<int64_t*>(p); });
  int64_t begin, end;
  RunFault fault;
  {
    nb::gil_scoped_release unlocked;
    begin = ticks();
    fault = machine.run(section, first, last, stamps);
    end = ticks();
  }
  // Each thread has written one stretch of its own; the view puts instructions first.
  const int64_t per_thread = static_cast<int64_t>(2 * n);
  const Table table(stamps, {n, threads, 2}, owner, {2, per_thread, 1});
  nb::object what = nb::none();
  if (fault.fault != Fault::none)
    what = nb::make_tuple(static_cast<int>(fault.fault), fault.instruction, fault.value,
                          fault.limit);
  return nb::make_tuple(begin, end, table, what);
}

// The content of a value, or None when its buffer holds another.
nb::object read(const Machine& machine, int section, int value) {
  const Machine::View v = machine.view(section, value);
  if (!v.data) return nb::none();
  const size_t rows = static_cast<size_t>(v.rows), width = static_cast<size_t>(v.width);
  float* out = new float[rows * width + 1];
  nb::capsule owner(out, [](void* p) noexcept { delete[] static_cast<float*>(p); });
  for (size_t r = 0; r < rows; ++r)
    std::memcpy(out + r * width, v.data + static_cast<int64_t>(r) * v.stride, 4 * width);
  if (v.ids)
    return nb::cast(nb::ndarray<nb::numpy, int32_t, nb::ndim<2>>(out, {rows, width}, owner));
  return nb::cast(nb::ndarray<nb::numpy, float, nb::ndim<2>>(out, {rows, width}, owner));
}

// Replaces a value; False when its buffer holds another. The array has its shape and type.
bool write(const Machine& machine, int section, int value, nb::handle array) {
  Views views;
  const Span<uint8_t> from = views.get<uint8_t>(array);
  const Machine::View v = machine.view(section, value);
  if (!v.data) return false;
  require(from.size == v.rows * v.width * 4, "the array does not have the size of the value");
  const size_t bytes = 4 * static_cast<size_t>(v.width);
  for (int64_t r = 0; r < v.rows; ++r)
    std::memcpy(v.data + r * v.stride, from.data + static_cast<size_t>(r) * bytes, bytes);
  return true;
}

Machine* make(int threads, const std::optional<std::string>& path) {
  require(threads >= 1 && threads <= 1024,
          "threads=" + std::to_string(threads) + " is no thread count; valid: 1 to 1024");
  return new Machine(threads, &find_path(path));
}

void raise_failure(const Failure& failure) {
  nb::object kind = nb::module_::import_("lmclock.errors").attr(failure.kind);
  PyErr_SetString(kind.ptr(), failure.message.c_str());
}

}  // namespace

void bind_machine(nb::module_& m) {
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void*) {
        try {
          std::rethrow_exception(p);
        } catch (const Failure& failure) {
          raise_failure(failure);
        } catch (const NotLive& value) {
          PyErr_SetObject(PyExc_LookupError, nb::int_(value.value).ptr());
        }
      },
      nullptr);
  nb::class_<Machine>(m, "Machine")
      .def(nb::new_(&make), nb::arg("threads"), nb::arg("path").none())
      .def_prop_ro("threads", &Machine::threads)
      .def_prop_ro("path", &Machine::path)
      .def_static("has", [](const std::optional<std::string>& path,
                            int opcode) { return Machine::has(find_path(path), opcode); },
                  nb::arg("path").none(), nb::arg("opcode"))
      .def("load", &load)
      .def("bind", &bind, nb::arg().none(), nb::arg().none(), nb::arg(), nb::arg(), nb::arg(),
           nb::arg(), nb::arg(), nb::arg().none(), nb::arg().none())
      .def("run", &run)
      .def("commit", &Machine::commit)
      .def("copy", [](Machine& machine, int state, nb::handle pairs) {
        Views views;
        const Span<int32_t> numbers = views.get<int32_t>(pairs);
        machine.copy(state, numbers.data, numbers.size / 2);
      })
      .def("read", &read)
      .def("write", &write);
  m.def("ticks", [] { return ticks(); });
  m.def("tick_source", [] { return nb::make_tuple(tick_source().name, tick_source().rate); });
}

}  // namespace lmclock
