"""Reading a captured graph: its nodes, edges, parameters and attributes, as the driver has them."""

from __future__ import annotations

import ctypes
from typing import Any

from capture_cache.restore_driver import Driver

_ATTRIBUTE_BYTES = 64  # of a CUlaunchAttributeValue


class GraphReader(Driver):
    """A driver that is asked about graphs; opened as any."""

    def graph_nodes(self, graph: int) -> list[int]:
        """Handles of all nodes."""
        count, doing = ctypes.c_size_t(), "listing the nodes of a graph"
        at = ctypes.addressof(count)
        self.check(self.lib.cuGraphGetNodes(graph, 0, at), doing)
        handles = (ctypes.c_uint64 * max(1, count.value))()
        self.check(self.lib.cuGraphGetNodes(graph, ctypes.addressof(handles), at), doing)
        return list(handles)[: count.value]

    def graph_edges(self, graph: int) -> list[tuple[int, int, bytes]]:
        """(from, to, CUgraphEdgeData) of all edges."""
        count, doing = ctypes.c_size_t(), "listing the edges of a graph"
        at, get = ctypes.addressof(count), self.lib.cuGraphGetEdges_v2
        self.check(get(graph, 0, 0, 0, at), doing)
        n = max(1, count.value)
        first, last, data = (
            (ctypes.c_uint64 * n)(),
            (ctypes.c_uint64 * n)(),
            (ctypes.c_char * 8 * n)(),
        )
        arrays = (ctypes.addressof(a) for a in (first, last, data))
        self.check(get(graph, *arrays, at), doing)
        raw = bytes(data)
        return [(first[i], last[i], raw[8 * i : 8 * i + 8]) for i in range(count.value)]

    def node_type(self, node: int) -> int:
        value = ctypes.c_int()
        status = self.lib.cuGraphNodeGetType(node, ctypes.addressof(value))
        self.check(status, "asking for a node's type")
        return value.value

    def kernel_node_params(self, node: int) -> bytes:
        """CUDA_KERNEL_NODE_PARAMS; its pointers are valid as long as the graph is."""
        return self._struct(self.lib.cuGraphKernelNodeGetParams_v2, node, 72)

    def memcpy_node_params(self, node: int, nbytes: int) -> bytes:
        """CUDA_MEMCPY3D."""
        return self._struct(self.lib.cuGraphMemcpyNodeGetParams, node, nbytes)

    def memset_node_params(self, node: int, nbytes: int) -> bytes:
        """CUDA_MEMSET_NODE_PARAMS."""
        return self._struct(self.lib.cuGraphMemsetNodeGetParams, node, nbytes)

    def node_attribute(self, node: int, which: int) -> bytes:
        """CUlaunchAttributeValue; empty where the driver knows no such attribute."""
        memory = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        status = self.lib.cuGraphKernelNodeGetAttribute(node, which, ctypes.addressof(memory))
        return b"" if status else memory.raw

    def try_kernel_node(self, graph: int, params: bytes) -> int:
        """Add a kernel node from CUDA_KERNEL_NODE_PARAMS; 0 where the driver refuses."""
        memory, node = ctypes.create_string_buffer(params, len(params)), ctypes.c_uint64()
        out, at = ctypes.addressof(node), ctypes.addressof(memory)
        return 0 if self.lib.cuGraphAddKernelNode_v2(out, graph, 0, 0, at) else node.value

    def function_of(self, kernel: int) -> int:
        return self._new(self.lib.cuKernelGetFunction, kernel, doing="resolving a kernel")

    def function_name(self, function: int) -> str:
        at = self._new(self.lib.cuFuncGetName, function, doing="asking for a kernel's name")
        return ctypes.string_at(at).decode()

    def param_info(self, function: int) -> list[tuple[int, int]]:
        """(offset, bytes) of each parameter."""
        pair, found = (ctypes.c_size_t * 2)(), list[tuple[int, int]]()
        at = ctypes.addressof(pair)
        while not self.lib.cuFuncGetParamInfo(function, len(found), at, at + 8):
            found.append((pair[0], pair[1]))
        return found

    def function_attribute(self, function: int, which: int) -> int:
        value = ctypes.c_int()
        status = self.lib.cuFuncGetAttribute(ctypes.addressof(value), which, function)
        self.check(status, f"asking for attribute {which} of a kernel")
        return value.value

    def is_address(self, value: int, attribute: int) -> bool:
        """Whether the driver knows `value` as an address of device or pinned memory."""
        return not self.lib.cuPointerGetAttribute(self._out, attribute, value)

    def _struct(self, call: Any, node: int, nbytes: int) -> bytes:
        memory = ctypes.create_string_buffer(nbytes + 64)
        self.check(call(node, ctypes.addressof(memory)), "asking for a node's parameters")
        return memory.raw[:nbytes]
