"""What reads bytes that a peer sent, and which target fuzzes it.

Found by looking through the syntax of every module of ``kvconnect`` for what takes messages apart:
``unpack``, ``frombuffer`` and the like, ``from_wire``, `kvconnect.buffers.fields`, a constant key taken from
a map, and the operations that are handled. `test_catalogue` repeats the search: what it finds and this table
does not have fails it, and so does what the table has and it does not find. (``connectors``, ``proxy``
and the command line are not searched: they talk to clients and to vLLM.)

``plain``: compares one value of a map, which the control channel has checked, with one that it knows.
``own``: not a peer's bytes.

======================  =====================  ==============================================================
target                  module                 functions
======================  =====================  ==============================================================
control_message         messages               decode error_of _is_frame
control_server          control                ControlServer._receive ControlServer._answer ControlServer._call
control_client          control                _Peer._take
control_endpoint        control                split
own                     control                _Peer._notice
control_door            keys                   _Door._answer
hello                   buffers.hello          Hello.from_wire misfit
hello                   buffers.peers          Peers._heard worker_of
hello                   buffers.choice         choose_pipe _refused _by_pipe
hello                   buffers.fields         binary
layout                  paging                 PagedLayout.from_wire
layout                  buffers.layouts        check_shapes read _parsed
ticket                  buffers.ticket         Ticket.from_wire unpack_ids
own                     buffers.ticket         Ticket.to_wire
lender                  buffers.lender         Lender._hello Lender._match Lender._renew Lender._release
lender                  buffers.lender         Lender._vouch Lender._abandon Lender._misfit
owners_answers          buffers.taker          Taker._read_ticket Taker._heard Taker._refusal _check_workers
own                     buffers.lender         Lender._introduction
own                     buffers.taker          Taker._ask
owners_answers          buffers.renewal        Renewal._answered
owners_answers          buffers.promise        Promise.prolong Promise._is_of_our_clock Promise._heard
directory               buffers.directory      Directory._read _alive
own                     buffers.directory      base_directory
stored_entry            buffers.arena          decode
own                     buffers.arena          encode
store_manifest          buffers.store_manifest Manifest.unpack
own                     buffers.store_manifest Manifest.pack
own                     buffers.store_parts    Rooms.take
own                     buffers.store_scheduler StoreScheduler.offer
store_manifest          buffers.store_looks    Looks._judge
store_manifest          buffers.store_table    StoreBuffer._present StoreBuffer.claim
store_manifest          buffers.store_over_table TableStore._drop_chunks
own                     buffers.store_over_table TableStore.publish _tensor
plain                   buffers.store_looks    _is_coming
store_worker            buffers.store_worker   StoreWorker._asked StoreWorker._write
own                     buffers.store_offers   _part
plain                   buffers.mover          Mover._released
own                     buffers.mover          Mover._start Mover._link _as_load_error
plain                   buffers.remote         RemoteBuffer._release
own                     buffers.remote         RemoteBuffer._present
plain                   buffers.channels       Channels._seen
worker_pipes            buffers.channels       Channels._call Channels._ping
worker_pipes            buffers.serving        PipeServer._admit PipeServer._handle_ready
worker_pipes            buffers.serving        PipeServer._handle_close
worker_pipes            buffers.integrity      Integrity._handle
sums                    buffers.integrity      Integrity.compare.check
asking_worker           buffers.lines          Lines.open Lines._join.exchange
wire_header             pipes.wire             read _parse
tcp_seal                pipes.tcp_checksum     check_seal unpack
tcp_tensors             pipes.tcp_messages     SummedMessages.recv_body
tcp_blocks              pipes.tcp_frames       unpack
tcp_blocks              pipes.tcp_requests     BlockRequests._serve BlockRequests.begin
tcp_blocks              pipes.tcp_stream       FrameReader._begin
own                     pipes.tcp_stream       FrameWriter._compose
tcp_block_ids           pipes.tcp_frames       unpack_ids
tcp_newcomer            pipes.tcp_listener     Listener._admit _Newcomer._read
tcp_meeting             pipes.tcp_meeting      _wants_checksum _check_tls _secret _checked
tcp_opening             pipes.tcp_meeting      Serving.__init__
own                     pipes.tcp_farewell     _unacknowledged
own                     pipes.tcp_tls          TlsIo.flush
shm_meeting             pipes.shm              ShmPipe._look_at
shm_meeting             pipes.peer_memory      PeerMemory.__init__
own                     pipes.peer_memory      Beacon.__init__
shm_meeting             pipes.peer_process     PeerProcess.__init__
shm_meeting             pipes.shm_blocks       Word.read
shm_meeting             pipes.shm_lane         connect
shm_visitor             pipes.shm_lane         Listener._admit _recv_fd
shm_messages            pipes.shm_messages     Receiver._take
shm_replies             pipes.shm_messages     Sender._send_large
shm_ring                pipes.ring             adopt
own                     pipes.ring             Ring.__init__
block_stream            pipes.stream           BlockStream._accept BlockStream._on_done BlockStream._on_broken
plain                   pipes.stream           BlockStream._stopped
block_stream            pipes.flows            flow_key unpack
block_tag               pipes.flows            read_tag
own                     pipes.flows            write_tag
nixl_blocks             pipes.nixl_blocks      NixlBlocks._on_refused NixlBlocks._on_pull NixlBlocks._on_pulled
nixl_blocks             pipes.nixl_lending     Lending.on_begin
nixl_blocks             pipes.nixl_meeting     Meeting._learn
nixl_blocks             pipes.nixl_notes       Notes.on_note Notes._on_notification
plain                   pipes.nixl_write       Write._runs Write._stopped
nixl_note               pipes.nixl_notes       Note.unpack
nixl_card               pipes.nixl             NixlMedium.meet
nixl_card               pipes.nixl_place       read_card
plain                   pipes.nixl             NixlPipe.__init__
plain                   pipes.legacy           _AdoptedPipe.__init__
nccl_blocks             pipes.nccl_blocks      NcclBlocks._on_meet NcclBlocks._on_done NcclBlocks._on_broken
nccl_blocks             pipes.nccl_plan        read_selection read_row
cuda_ipc_export         cuda.ipc               _checked
cuda_ipc_card           pipes.cuda_ipc_staging CudaIpcMedium.meet
own                     cuda.copier            pinned
staged_tensors          pipes.staged           StagedTensors._await_acknowledgement StagedTensors._fetch
own                     pipes.staged           StagedTensors._tell
companion               pipes.companion        _offers _is_offer
pipe_cards              pipes.host             within
pipe_cards              pipes.nccl             _fit
pipe_cards              pipes.cuda_ipc         CudaIpcPipe.can_reach
pipe_cards              pipes.shm              ShmPipe.can_reach
pipe_cards              pipes.inproc           InprocPipe._meet
own                     pipes.landing          Landing.empty
doctor                  doctor.peer            read is_here _versions _fields _pipe _place _same_host
doctor                  doctor.peer            _hidden_gpus _unreadable
own                     doctor.report          Report.from_json Report.to_text
own                     doctor.intent          load examine _intent
own                     doctor.host            _pipe_ports
======================  =====================  ==============================================================

Operations: ``hello match claim renew release abandon`` (lender), ``pipe.*`` (worker_pipes), ``blocks.*``
(block_stream), ``nixl.*`` (nixl_blocks), ``nccl.*`` (nccl_blocks), ``shm.memory`` (shm_meeting, worker_pipes),
``cuda_ipc.memory`` (cuda_ipc_export), ``cuda_ipc.end`` (takes nothing).
"""

from __future__ import annotations

from tests.fuzz import of_blocks, of_bytes, of_control, of_doctor, of_pipes, of_stores
from tests.fuzz.harness import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for room in (of_control, of_bytes, of_blocks, of_pipes, of_stores, of_doctor)
    for target in room.TARGETS
}
