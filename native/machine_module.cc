// The native machine as a Python class; lmclock/machines/native.py is the contract around it.

#include <cstring>

#include "binding.h"
#include "machine.h"

namespace lmclock {

namespace {

// Memory of Python arrays for the time of a call.
class Views {
 public:
  Views() = default;
  Views(const Views&) = delete;
  ~Views() {
    for (Py_buffer& b : held_) PyBuffer_Release(&b);
  }

  // The bytes of a C-contiguous array as Ts; nothing for None.
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

  // The same for elements of one type, a code of the struct module; size -1 where the array has
  // another type or layout. Code 0: records of `size` bytes.
  template <class T>
  Span<T> get(nb::handle array, char code, Py_ssize_t size) {
    Py_buffer& b = held_.emplace_back();
    if (PyObject_GetBuffer(array.ptr(), &b, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) != 0) {
      held_.pop_back();
      PyErr_Clear();
      return {nullptr, -1};
    }
    const bool same = b.itemsize == size && (!code || (b.format[0] == code && !b.format[1]));
    if (!same) return {nullptr, -1};
    return {static_cast<const T*>(b.buf), b.len / static_cast<Py_ssize_t>(sizeof(T))};
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
    w.mapped = nb::cast<bool>(t[6]);
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

// Attributes of Batch and Rows by interned names: looking them up is most of what bind does.
struct Names {
  PyObject *rows = name("rows"), *inputs = name("inputs"), *slots = name("slots"),
           *pages = name("pages"), *lengths = name("lengths"), *pick = name("pick"),
           *sampling = name("sampling"), *adjust = name("adjust"), *starts = name("starts"),
           *positions = name("positions"), *valid = name("valid"), *tok = name("tok"),
           *src = name("src");
  static PyObject* name(const char* text) { return PyUnicode_InternFromString(text); }
};

// A batch as the machine takes it; `names` of inputs and paged states are those of the program.
class BatchReader {
 public:
  BatchReader(const nb::handle& batch, const nb::list& inputs, const nb::list& states,
              const nb::object& convert)
      : batch_(batch), convert_(convert) {
    static const Names names;
    const nb::object rows = attribute(batch, names.rows);
    source.tok = rows_of(item(rows, names.tok), names);
    source.src = rows_of(item(rows, names.src), names);
    const nb::object given = attribute(batch, names.inputs);
    for (nb::handle input : inputs) {
      const nb::tuple t = nb::borrow<nb::tuple>(input);  // (name, type code)
      const char code = nb::cast<const char*>(t[1])[0];
      source.inputs.push_back(array<uint8_t>(item(given, t[0].ptr()), code, 4));
    }
    source.slots = array<int32_t>(attribute(batch, names.slots), 'i', 4);
    const nb::object pages = attribute(batch, names.pages);
    const nb::object lengths = attribute(batch, names.lengths);
    for (nb::handle state : states) {  // None for a fixed one
      std::vector<Span<int32_t>>& tables = source.pages.emplace_back();
      Span<int32_t>& length = source.lengths.emplace_back();
      if (state.is_none()) continue;
      if (const nb::handle list = item(pages, state.ptr()); list.is_valid())
        for (nb::handle table : list) tables.push_back(array<int32_t>(table, 'i', 4));
      if (const nb::handle x = item(lengths, state.ptr()); x.is_valid())
        length = array<int32_t>(x, 'i', 4);
    }
    source.pick = array<int32_t>(attribute(batch, names.pick), 'i', 4);
    source.sampling = array<uint8_t>(attribute(batch, names.sampling), 0, sizeof(isa::Sampling));
    source.adjust = array<uint8_t>(attribute(batch, names.adjust), 0, sizeof(isa::Adjust));
  }

  BatchSource source;

 private:
  nb::object attribute(nb::handle object, PyObject* name) {
    PyObject* found = PyObject_GetAttr(object.ptr(), name);
    if (!found) throw nb::python_error();
    kept_.push_back(nb::steal(found));
    return kept_.back();
  }

  // An entry of a dict, or an invalid handle.
  static nb::handle item(nb::handle dict, PyObject* key) {
    PyObject* found = PyDict_GetItemWithError(dict.ptr(), key);
    if (!found && PyErr_Occurred()) throw nb::python_error();
    return found;
  }

  BatchSource::Rows rows_of(nb::handle rows, const Names& names) {
    if (!rows.is_valid()) return {};
    return {array<int32_t>(attribute(rows, names.starts), 'i', 4),
            array<int32_t>(attribute(rows, names.positions), 'i', 4),
            array<uint8_t>(attribute(rows, names.valid), '?', 1)};
  }

  // The elements of an array; one of another type or layout is converted. Code 0: records.
  template <class T>
  Span<T> array(nb::handle x, char code, Py_ssize_t size) {
    if (!x.is_valid()) return {};
    Span<T> found = views_.get<T>(x, code, size);
    if (found.size < 0) {
      kept_.push_back(convert_(x, std::string(code ? 1 : 0, code)));
      found = views_.get<T>(kept_.back(), code, size);
    }
    require(found.size >= 0, "an array of the batch has elements of a wrong type");
    return found;
  }

  nb::handle batch_;
  nb::object convert_;
  std::vector<nb::object> kept_;
  Views views_;
};

void bind(Machine& machine, nb::handle batch, nb::list inputs, nb::list states,
          nb::object convert) {
  const BatchReader reader(batch, inputs, states, convert);
  machine.bind(reader.source);
}

nb::object fault_of(const RunFault& fault) {
  if (fault.fault == Fault::none) return nb::none();
  return nb::make_tuple(static_cast<int>(fault.fault), fault.instruction, fault.value, fault.limit);
}

// (begin, end, fault): the fault is None or (kind, instruction, value, limit). `table` is int64
// (instructions, threads, 2).
nb::tuple run(Machine& machine, int section, int64_t first, int64_t last, nb::handle table) {
  Views views;
  const Span<int64_t> stamps = views.get<int64_t>(table);
  require(stamps.size == 2 * (last - first) * machine.threads(), "the table does not fit the run");
  int64_t begin, end;
  RunFault fault;
  {
    nb::gil_scoped_release unlocked;
    begin = ticks();
    fault = machine.run(section, first, last, const_cast<int64_t*>(stamps.data));
    end = ticks();
  }
  return nb::make_tuple(begin, end, fault_of(fault));
}

// (cycles done, fault of the first or None). `feed` is (ids, positions, next, stops, stop_starts);
// the arrays are int64 (most, threads, instructions, 2), int64 (most, 2) and int32 (most, rows).
nb::tuple run_many(Machine& machine, int section, int64_t instructions, nb::tuple feed,
                   nb::handle table, nb::handle bounds, nb::handle tokens) {
  Views views;
  const auto number = [&](size_t n) { return nb::cast<int32_t>(feed[n]); };
  const Feed fed = {number(0), number(1), number(2), views.get<int32_t>(feed[3]),
                    views.get<int32_t>(feed[4])};
  const Span<int64_t> stamps = views.get<int64_t>(table), ends = views.get<int64_t>(bounds);
  const Span<int32_t> out = views.get<int32_t>(tokens);
  const int64_t most = ends.size / 2;
  require(stamps.size == 2 * most * instructions * machine.threads() &&
              out.size == most * (fed.stop_starts.size - 1),
          "the tables do not fit the cycles");
  RunFault fault = {Fault::none, 0, 0, 0};
  int64_t done;
  {
    nb::gil_scoped_release unlocked;
    done = machine.run_many(section, most, fed, const_cast<int64_t*>(stamps.data),
                            const_cast<int64_t*>(ends.data), const_cast<int32_t*>(out.data),
                            &fault);
  }
  return nb::make_tuple(done, fault_of(fault));
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
#if LMCLOCK_UNCLOCKED
      .def_rw("clocked", &Machine::clocked)
#endif
      .def(nb::new_(&make), nb::arg("threads"), nb::arg("path").none())
      .def_prop_ro("threads", &Machine::threads)
      .def_prop_ro("path", &Machine::path)
      .def_static("has", [](const std::optional<std::string>& path,
                            int opcode) { return Machine::has(find_path(path), opcode); },
                  nb::arg("path").none(), nb::arg("opcode"))
      .def("prepare", &Machine::prepare)
      .def("load", &load)
      .def("bind", &bind)
      .def("run", &run)
      .def("run_many", &run_many)
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
