from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class DescribeResponse(_message.Message):
    __slots__ = ("federation", "holding", "limits")
    FEDERATION_FIELD_NUMBER: _ClassVar[int]
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    federation: Federation
    holding: Holding
    limits: Limits
    def __init__(self, federation: _Optional[_Union[Federation, _Mapping]] = ..., holding: _Optional[_Union[Holding, _Mapping]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Federation(_message.Message):
    __slots__ = ("name", "version", "state", "base", "lora", "tasks", "held_out", "prompt", "needs_general_text", "registry_port", "secure", "seed", "best")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    BASE_FIELD_NUMBER: _ClassVar[int]
    LORA_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    NEEDS_GENERAL_TEXT_FIELD_NUMBER: _ClassVar[int]
    REGISTRY_PORT_FIELD_NUMBER: _ClassVar[int]
    SECURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    version: str
    state: str
    base: BaseModel
    lora: Lora
    tasks: _containers.RepeatedScalarFieldContainer[str]
    held_out: _containers.RepeatedScalarFieldContainer[str]
    prompt: str
    needs_general_text: bool
    registry_port: int
    secure: bool
    seed: str
    best: str
    def __init__(self, name: _Optional[str] = ..., version: _Optional[str] = ..., state: _Optional[str] = ..., base: _Optional[_Union[BaseModel, _Mapping]] = ..., lora: _Optional[_Union[Lora, _Mapping]] = ..., tasks: _Optional[_Iterable[str]] = ..., held_out: _Optional[_Iterable[str]] = ..., prompt: _Optional[str] = ..., needs_general_text: _Optional[bool] = ..., registry_port: _Optional[int] = ..., secure: _Optional[bool] = ..., seed: _Optional[str] = ..., best: _Optional[str] = ...) -> None: ...

class BaseModel(_message.Message):
    __slots__ = ("model", "revision", "dtype", "quantization", "name", "digest")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    model: str
    revision: str
    dtype: str
    quantization: str
    name: str
    digest: str
    def __init__(self, model: _Optional[str] = ..., revision: _Optional[str] = ..., dtype: _Optional[str] = ..., quantization: _Optional[str] = ..., name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class Lora(_message.Message):
    __slots__ = ("rank", "alpha", "targets", "rslora", "dropout")
    RANK_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    RSLORA_FIELD_NUMBER: _ClassVar[int]
    DROPOUT_FIELD_NUMBER: _ClassVar[int]
    rank: int
    alpha: float
    targets: _containers.RepeatedScalarFieldContainer[str]
    rslora: bool
    dropout: float
    def __init__(self, rank: _Optional[int] = ..., alpha: _Optional[float] = ..., targets: _Optional[_Iterable[str]] = ..., rslora: _Optional[bool] = ..., dropout: _Optional[float] = ...) -> None: ...

class Holding(_message.Message):
    __slots__ = ("complete", "received")
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    complete: bool
    received: int
    def __init__(self, complete: _Optional[bool] = ..., received: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("upload", "participant", "used")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    USED_FIELD_NUMBER: _ClassVar[int]
    upload: int
    participant: int
    used: int
    def __init__(self, upload: _Optional[int] = ..., participant: _Optional[int] = ..., used: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("page_size", "page_token", "recipe")
    PAGE_SIZE_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    page_size: int
    page_token: str
    recipe: str
    def __init__(self, page_size: _Optional[int] = ..., page_token: _Optional[str] = ..., recipe: _Optional[str] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("manifests", "next_page_token")
    MANIFESTS_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    manifests: _containers.RepeatedScalarFieldContainer[bytes]
    next_page_token: str
    def __init__(self, manifests: _Optional[_Iterable[bytes]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class Header(_message.Message):
    __slots__ = ("manifest", "config", "size")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    config: bytes
    size: int
    def __init__(self, manifest: _Optional[bytes] = ..., config: _Optional[bytes] = ..., size: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: str
    offset: int
    def __init__(self, digest: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class FetchResponse(_message.Message):
    __slots__ = ("header", "tensors")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    header: Header
    tensors: bytes
    def __init__(self, header: _Optional[_Union[Header, _Mapping]] = ..., tensors: _Optional[bytes] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("begin", "tensors")
    class Begin(_message.Message):
        __slots__ = ("digest", "header", "offset")
        DIGEST_FIELD_NUMBER: _ClassVar[int]
        HEADER_FIELD_NUMBER: _ClassVar[int]
        OFFSET_FIELD_NUMBER: _ClassVar[int]
        digest: str
        header: Header
        offset: int
        def __init__(self, digest: _Optional[str] = ..., header: _Optional[_Union[Header, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    begin: SubmitRequest.Begin
    tensors: bytes
    def __init__(self, begin: _Optional[_Union[SubmitRequest.Begin, _Mapping]] = ..., tensors: _Optional[bytes] = ...) -> None: ...

class SubmitResponse(_message.Message):
    __slots__ = ("holding",)
    HOLDING_FIELD_NUMBER: _ClassVar[int]
    holding: Holding
    def __init__(self, holding: _Optional[_Union[Holding, _Mapping]] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("kind", "time", "node", "name", "detail")
    KIND_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    kind: str
    time: float
    node: str
    name: str
    detail: str
    def __init__(self, kind: _Optional[str] = ..., time: _Optional[float] = ..., node: _Optional[str] = ..., name: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("offset",)
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    offset: int
    def __init__(self, offset: _Optional[int] = ...) -> None: ...

class WatchResponse(_message.Message):
    __slots__ = ("event", "offset")
    EVENT_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    event: Event
    offset: int
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ..., offset: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("digest", "task", "name", "participant", "time", "withdrawn")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    PARTICIPANT_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    WITHDRAWN_FIELD_NUMBER: _ClassVar[int]
    digest: str
    task: str
    name: str
    participant: str
    time: float
    withdrawn: bool
    def __init__(self, digest: _Optional[str] = ..., task: _Optional[str] = ..., name: _Optional[str] = ..., participant: _Optional[str] = ..., time: _Optional[float] = ..., withdrawn: _Optional[bool] = ...) -> None: ...

class ContributeRequest(_message.Message):
    __slots__ = ("digest", "task", "name")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    digest: str
    task: str
    name: str
    def __init__(self, digest: _Optional[str] = ..., task: _Optional[str] = ..., name: _Optional[str] = ...) -> None: ...

class ContributeResponse(_message.Message):
    __slots__ = ("contribution",)
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    contribution: Contribution
    def __init__(self, contribution: _Optional[_Union[Contribution, _Mapping]] = ...) -> None: ...

class WithdrawRequest(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class WithdrawResponse(_message.Message):
    __slots__ = ("contribution",)
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    contribution: Contribution
    def __init__(self, contribution: _Optional[_Union[Contribution, _Mapping]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("event",)
    EVENT_FIELD_NUMBER: _ClassVar[int]
    event: Event
    def __init__(self, event: _Optional[_Union[Event, _Mapping]] = ...) -> None: ...

class ReportResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
