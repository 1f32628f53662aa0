"""The binding to NCCL, called for real against a library with NCCL's symbols that is compiled here."""

from __future__ import annotations

import ctypes
import subprocess
import textwrap

import pytest

from kvconnect.cuda import driver, nccl
from kvconnect.errors import BrokenError, HandshakeError, UnavailableBackendError

LIBRARY = """
#include <limits.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct { char internal[128]; } ncclUniqueId;
typedef struct {
  size_t size; unsigned int magic; unsigned int version;
  int blocking; int cgaClusterSize; int minCTAs; int maxCTAs; const char *netName; int splitShare;
} ncclConfig_t;
/* What a newer library has: it copies as much as the caller says. */
typedef struct { ncclConfig_t known; int trafficClass; const char *commName; } newer;
struct comm { int rank, looks, failed, maxCTAs, blocking, tried; struct comm **child; char name[128]; };

int aborted = 0, children = 0, late = 0;
struct { const void *address; size_t count; int type, peer; void *stream; int sends; } last;

int ncclGetVersion(int *version) { *version = VERSION; return 0; }
int ncclGetUniqueId(ncclUniqueId *id) { for (int i = 0; i < 128; i++) id->internal[i] = (char)i; return 0; }
int ncclCommInitRankConfig(struct comm **out, int ranks, ncclUniqueId id, int rank, ncclConfig_t *given)
{
  newer config = {{0}, INT_MIN, NULL};
  memcpy(&config, given, given->size < sizeof config ? given->size : sizeof config);
  if (ranks != 2 || config.known.magic != 0xcafebeef || config.known.version != 21800) return 4;
  if (config.known.blocking != 0 || config.known.netName || config.known.splitShare != 1) return 5;
  if (config.known.minCTAs > config.known.maxCTAs || config.trafficClass != INT_MIN) return 5;
  struct comm *comm = calloc(1, sizeof *comm);
  comm->rank = rank; comm->looks = 2; comm->maxCTAs = config.known.maxCTAs;
  memcpy(comm->name, id.internal, 128);
  *out = comm;
  return 7;
}
int ncclCommSplit(struct comm *parent, int color, int key, struct comm **out, ncclConfig_t *given)
{
  if (parent->blocking || parent->looks > 0 || color != 0 || key != parent->rank || *out) return 4;
  if (given->blocking != 1 || given->splitShare != 1 || given->maxCTAs != parent->maxCTAs) return 5;
  parent->child = out; parent->looks = 2;
  return 7;
}
static void born(struct comm *parent)
{
  struct comm *comm = calloc(1, sizeof *comm);
  comm->rank = parent->rank; comm->blocking = 1; comm->tried = parent->tried;
  *parent->child = comm; parent->child = NULL; children++;
}
int ncclCommGetAsyncError(struct comm *comm, int *state)
{
  *state = comm->failed ? 6 : comm->looks > 0 ? 7 : 0;
  if (!*state && comm->child) born(comm);
  comm->looks--;
  return 0;
}
int ncclCommAbort(struct comm *comm)
{
  if (comm->child && late) born(comm);
  free(comm); aborted++;
  return 0;
}
static int op(const void *address, size_t count, int type, int peer, struct comm *comm, void *stream, int sends)
{
  if (comm->looks > 0) return 4;
  last.address = address; last.count = count; last.type = type; last.peer = peer; last.stream = stream;
  last.sends = sends;
  if (count == 13) comm->failed = 1;
  if (comm->blocking) return comm->tried ? 0 : 3;
  comm->looks = 1; comm->tried = 1;
  return 7;
}
int ncclSend(const void *a, size_t n, int t, int p, struct comm *c, void *s) { return op(a, n, t, p, c, s, 1); }
int ncclRecv(void *a, size_t n, int t, int p, struct comm *c, void *s) { return op(a, n, t, p, c, s, 0); }
const char *ncclGetErrorString(int code) { return code == 6 ? "remote process exited" : "invalid argument"; }
const char *ncclGetLastError(struct comm *comm) { return comm ? "peer went away\\n" : ""; }
"""


class Last(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
        ("type", ctypes.c_int),
        ("peer", ctypes.c_int),
        ("stream", ctypes.c_void_p),
        ("sends", ctypes.c_int),
    )


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Return ``compiled(version)``, which lets the binding find a library of that version."""

    def compiled(version: int, source: str = LIBRARY) -> ctypes.CDLL:
        path = tmp_path / f"libnccl.{version}.so"
        (tmp_path / "nccl.c").write_text(textwrap.dedent(source))
        command = ["gcc", "-shared", "-fPIC", f"-DVERSION={version}", "-o", str(path), str(tmp_path / "nccl.c")]
        subprocess.run(command, check=True, timeout=30)
        monkeypatch.setattr(nccl, "_open", lambda kind: kind(str(path)))
        nccl._library.cache_clear()
        return ctypes.CDLL(str(path))

    yield compiled
    nccl._library.cache_clear()


def make(name: bytes, *, sends: bool = False, max_ctas: int = 8) -> nccl.Communicator:
    return nccl.Communicator(name, sends=sends, max_ctas=max_ctas, address=512, stream=9)


def settle(communicator: nccl.Communicator) -> int:
    """Return how many looks it took."""
    looks = 1
    while not communicator.settled():
        looks += 1
    return looks


def test_the_configuration_has_the_layout_of_nccl_2_18():
    offsets = {name: getattr(nccl.Config, name).offset for name, _ in nccl.Config._fields_}
    assert offsets == {
        "size": 0,
        "magic": 8,
        "version": 12,
        "blocking": 16,
        "cga_cluster_size": 20,
        "min_ctas": 24,
        "max_ctas": 28,
        "net_name": 32,
        "split_share": 40,
        "reserved": 44,
    }
    assert ctypes.sizeof(nccl.Config) == 48
    assert ctypes.sizeof(nccl.UniqueId) == nccl.ID_BYTES == 128


def test_ranks_meet_and_connect_without_blocking_and_then_move_at_once(compiled):
    library = compiled(22809)
    assert nccl.version() == 22809
    name = nccl.unique_id()
    assert name == bytes(range(128))  # zero bytes are part of it
    communicator = make(name, sends=True, max_ctas=8)
    assert settle(communicator) > 5  # it meets, connects and splits, and none of these is waited for
    last = Last.in_dll(library, "last")
    assert (last.address, last.count, last.stream, last.sends) == (512, nccl.TRIAL_BYTES, 9, 1)
    communicator.move(1 << 40, 5 << 30, 77)
    assert settle(communicator) == 1
    last = Last.in_dll(library, "last")
    assert (last.address, last.count, last.type, last.peer, last.stream) == (1 << 40, 5 << 30, 1, 0, 77)
    assert last.sends


def test_the_other_rank_receives(compiled):
    library = compiled(22809)
    communicator = make(nccl.unique_id(), sends=False)
    settle(communicator)
    communicator.move(3, 4, 78)
    last = Last.in_dll(library, "last")
    assert (last.address, last.count, last.stream, last.peer, last.sends) == (3, 4, 78, 1, 0)


def test_what_fails_later_is_raised_by_the_next_look(compiled):
    compiled(22809)
    communicator = make(nccl.unique_id())
    settle(communicator)
    communicator.move(1, 13, 0)
    with pytest.raises(BrokenError, match=r"NCCL failed to go on: remote process exited \(error 6; peer went away\)"):
        settle(communicator)


def test_what_nccl_refuses_at_once_is_raised_at_once(compiled):
    compiled(22809)
    communicator = make(nccl.unique_id())
    with pytest.raises(BrokenError, match="still waits for the other rank"):
        communicator.move(1, 1, 0)
    with pytest.raises(BrokenError, match="make a communicator"):
        make(nccl.unique_id(), max_ctas=0)  # no CTA at all


@pytest.mark.parametrize("looks", range(12))
def test_an_aborted_communicator_leaves_nothing_however_far_it_was(compiled, looks):
    library = compiled(22809)
    late = ctypes.c_int.in_dll(library, "late")
    late.value = 1  # NCCL's threads make the child while the parent's end waits for them
    communicator = make(nccl.unique_id())
    for _ in range(looks):
        communicator.settled()
    communicator.abort()
    communicator.abort()
    children = ctypes.c_int.in_dll(library, "children").value
    assert ctypes.c_int.in_dll(library, "aborted").value == 1 + children
    with pytest.raises(BrokenError, match="given up"):
        communicator.settled()


def test_a_name_of_another_length_is_refused(compiled):
    compiled(22809)
    with pytest.raises(HandshakeError, match="128 bytes, not 5"):
        make(b"short")


def test_an_old_library_is_refused_by_its_version(compiled, monkeypatch):
    compiled(21705)
    with pytest.raises(UnavailableBackendError, match="21705 is older than 21800"):
        nccl.version()
    monkeypatch.setattr(driver, "missing", lambda: None)
    reason, cure = nccl.missing()
    assert "older" in reason
    assert "install" in cure


def test_a_library_without_a_function_is_too_old(compiled):
    compiled(22809, "int ncclGetVersion(int *version) { *version = VERSION; return 0; }")
    with pytest.raises(UnavailableBackendError, match=r"too old: .*ncclGetUniqueId"):
        nccl.version()


def test_what_cuda_lacks_is_said_before_nccl_is_looked_for(monkeypatch):
    monkeypatch.setattr(driver, "missing", lambda: ("there is no GPU", "buy one"))
    monkeypatch.setattr(nccl, "_open", lambda _: pytest.fail("NCCL was loaded"))
    assert nccl.missing() == ("there is no GPU", "buy one")
