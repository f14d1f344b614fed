/* Comparisons by identity of what a step works on with what it was, for gap_ds/masks/same.py. Called by ctypes.PyDLL, with
   the interpreter's lock held. Python's headers may not be installed, so its functions are declared here: all of them are
   exported by CPython since 3.9 with these types. References that are borrowed stay valid, since nothing is freed here. */

#include <stdint.h>

typedef struct PyObject PyObject;

extern intptr_t PyList_Size(PyObject *list);
extern PyObject *PyList_GetItem(PyObject *list, intptr_t index);
extern PyObject *PyDict_GetItemWithError(PyObject *dict, PyObject *key);
extern PyObject *PyObject_GetAttr(PyObject *object, PyObject *name);
extern PyObject *PyObject_CallOneArg(PyObject *callable, PyObject *argument);
extern PyObject *PyErr_Occurred(void);
extern void *PyLong_AsVoidPtr(PyObject *number);
extern void Py_DecRef(PyObject *object);

/* All answers: 1 if all are the same, else 0. An exception that was raised is the caller's. */

int same_items(PyObject *items, PyObject *before) {
    intptr_t count = PyList_Size(before);
    if (PyList_Size(items) != count) return 0;
    for (intptr_t i = 0; i < count; i++)
        if (PyList_GetItem(items, i) != PyList_GetItem(before, i)) return 0;
    return 1;
}

int same_values(PyObject *dict, PyObject *keys, PyObject *before) {
    intptr_t count = PyList_Size(keys);
    for (intptr_t i = 0; i < count; i++)
        if (PyDict_GetItemWithError(dict, PyList_GetItem(keys, i)) != PyList_GetItem(before, i)) return 0;
    return 1;
}

int same_slots(PyObject *dicts, PyObject *keys, PyObject *before) {
    intptr_t count = PyList_Size(keys);
    for (intptr_t i = 0; i < count; i++) {
        PyObject *found = PyDict_GetItemWithError(PyList_GetItem(dicts, i), PyList_GetItem(keys, i));
        if (found != PyList_GetItem(before, i)) return 0;
    }
    return 1;
}

/* data_ptr: the method of tensors; dtype: the name of their attribute. */
int same_places(PyObject *tensors, PyObject *data_ptr, PyObject *dtype, const int64_t *addresses, PyObject *dtypes) {
    intptr_t count = PyList_Size(dtypes);
    if (PyList_Size(tensors) != count) return 0;
    for (intptr_t i = 0; i < count; i++) {
        PyObject *tensor = PyList_GetItem(tensors, i);
        PyObject *number = PyObject_CallOneArg(data_ptr, tensor);
        if (!number) return 0;
        int64_t address = (int64_t)(intptr_t)PyLong_AsVoidPtr(number);
        Py_DecRef(number);
        if (address != addresses[i] || PyErr_Occurred()) return 0;
        PyObject *found = PyObject_GetAttr(tensor, dtype);
        if (!found) return 0;
        Py_DecRef(found); /* dtypes live as long as the process */
        if (found != PyList_GetItem(dtypes, i)) return 0;
    }
    return 1;
}
