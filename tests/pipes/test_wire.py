"""The message header: what goes in comes out, and nothing a peer sends does harm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvconnect.errors import BrokenError, TensorRejectedError
from kvconnect.pipes import wire
from kvconnect.pipes.wire import HEADER_BYTES, Kind

LIMIT = 1 << 20
DTYPES = [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.float32, torch.complex64, torch.float8_e4m3fn]


@settings(deadline=None)
@given(shape=st.lists(st.integers(0, 3), max_size=8), dtype=st.sampled_from(DTYPES))
def test_shape_and_dtype_survive_with_any_number_of_dimensions(shape: list[int], dtype: torch.dtype) -> None:
    header, dense = wire.encode(torch.zeros(shape, dtype=dtype))
    meta = wire.decode(header)
    assert dense is not None
    assert (meta.kind, meta.shape, meta.dtype, meta.nbytes) == (Kind.TENSOR, tuple(shape), dtype, dense.nbytes)
    assert meta.empty().shape == dense.shape
    assert HEADER_BYTES + wire.read(header[:HEADER_BYTES]) == len(header)


@given(data=st.binary(min_size=HEADER_BYTES, max_size=HEADER_BYTES + 8 * 64))
@settings(max_examples=300, deadline=None)
def test_arbitrary_bytes_are_refused_or_within_the_limit(data: bytes) -> None:
    _decode_safely(data)


@given(
    head=st.binary(min_size=6, max_size=6),
    rest=st.lists(
        st.sampled_from([0, 1, 2, 255, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]), min_size=7, max_size=71
    ),
)
@settings(max_examples=300, deadline=None)
def test_headers_that_look_right_are_refused_or_within_the_limit(head: bytes, rest: list[int]) -> None:
    numbers = b"".join(n.to_bytes(8, "little") for n in rest)
    _decode_safely(wire.MAGIC.to_bytes(2, "little") + head[:3] + bytes(3) + numbers)


@settings(deadline=None)
@given(flip=st.integers(0, HEADER_BYTES * 8 - 1))
def test_a_flipped_bit_never_makes_a_header_that_lies(flip: int) -> None:
    header = bytearray(wire.encode(torch.zeros(3, 5, dtype=torch.float16))[0])
    header[flip // 8] ^= 1 << flip % 8
    _decode_safely(bytes(header))


def test_a_tensor_above_the_limit_is_refused_before_memory_is_taken() -> None:
    header, _ = wire.encode(torch.zeros(1025, dtype=torch.uint8))
    with pytest.raises(BrokenError, match="limit 1024"):
        wire.decode(header, 1024)


def test_control_messages_have_no_tensor() -> None:
    for kind in Kind:
        if kind is not Kind.TENSOR:
            assert wire.decode(wire.control(kind)).kind is kind
    assert wire.encode(None) == (wire.control(Kind.NONE), None)


def test_strided_and_lazily_conjugated_values_are_sent_as_they_read() -> None:
    values = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    for tensor in (values.t(), values[:, ::2], torch.view_as_complex(values.reshape(3, 2, 2)).conj()):
        _, dense = wire.encode(tensor)
        assert dense is not None
        assert dense.is_contiguous()
        assert not dense.is_conj()
        assert torch.equal(dense, tensor)


def test_a_contiguous_tensor_is_sent_from_where_it_lies() -> None:
    tensor = torch.zeros(4, 4, requires_grad=True)
    _, dense = wire.encode(tensor)
    assert dense is not None
    assert dense.data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2).to_sparse(), torch.zeros(1, device="meta"), [1, 2]], ids=["sparse", "meta", "list"]
)
def test_what_cannot_be_carried_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(TensorRejectedError):
        wire.encode(tensor)


def _decode_safely(data: bytes) -> None:
    try:
        size = HEADER_BYTES + wire.read(data[:HEADER_BYTES])
        meta = wire.decode(data[:size], LIMIT)
    except BrokenError:
        return
    assert meta.nbytes == math.prod(meta.shape) * meta.dtype.itemsize or meta.kind is not Kind.TENSOR
    assert meta.nbytes <= LIMIT
    assert meta.empty().nbytes == (meta.nbytes if meta.kind is Kind.TENSOR else 0) or not meta.shape
