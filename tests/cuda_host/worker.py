"""Calls functions of the host build for tests/kernels/host_build.py, which starts it with AddressSanitizer preloaded.

A request: (function, arguments, result type). An argument is ("int64", 3), ("double", 0.5), ("int", 1), ("null", None),
("memory", buffer, offset) or ("states", buffer, offset, strides); a buffer is the number of one of `buffers`, which
come with the request. Each lies in an allocation of its own, exactly as long, so that a byte too far is found.
"""

import ctypes
import pickle
import struct
import sys

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]


class States(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "token", "head"))]


NUMBERS = {"int64": ctypes.c_int64, "int": ctypes.c_int, "double": ctypes.c_double}


def argument(kind, pointers, *content):
    if kind == "null":
        return ctypes.c_void_p(None)
    if kind == "memory":
        return ctypes.c_void_p((pointers[content[0]] + content[1]) or None)
    if kind == "states":
        return States((pointers[content[0]] + content[1]) or None, *content[2])
    return NUMBERS[kind](content[0])


def answer(library, name, arguments, result, buffers):
    pointers = []
    for data in buffers:
        pointer = libc.malloc(len(data)) if data else 0  # torch gives an empty tensor no address
        ctypes.memmove(pointer, bytes(data), len(data))
        pointers.append(pointer)
    function = getattr(library, name)
    function.restype = NUMBERS[result]
    value = function(*(argument(kind, pointers, *content) for kind, *content in arguments))
    contents = [ctypes.string_at(pointer, len(data)) for pointer, data in zip(pointers, buffers, strict=True)]
    for pointer in pointers:
        libc.free(pointer)
    return value, contents


def main():
    library = ctypes.CDLL(sys.argv[1])
    while size := sys.stdin.buffer.read(8):
        request = pickle.loads(sys.stdin.buffer.read(struct.unpack("<q", size)[0]))
        message = pickle.dumps(answer(library, *request))
        sys.stdout.buffer.write(struct.pack("<q", len(message)) + message)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
