// An empty Python module: build tools know how to build and place one. Its shared object is loaded by ctypes.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_core", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__core(void) { return PyModule_Create(&definition); }
