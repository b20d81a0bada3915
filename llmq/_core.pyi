"""Types of the compiled module (cpp/bindings.cpp). Arrays are passed as addresses; llmq.kernels checks them first."""

class Layout:
    def __init__(self, *, n: int, k: int, source_group: int, bits: int, has_zero: bool, mid: int) -> None: ...
    @property
    def group(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def pack(self, *, q: int, scale: int, zero: int, out: int) -> None: ...
    def unpack(self, *, data: int, nbytes: int, q: int, scale: int, zero: int) -> None: ...
    def qgemm(self, *, data: int, nbytes: int, x: int, m: int, bias: int, out: int) -> None: ...
    def take_rows(self, *, data: int, nbytes: int, ids: int, count: int, out: int) -> None: ...

def isas() -> list[str]: ...
def isa() -> str: ...
def use_isa(isa: str) -> None: ...
def features(*, leaf1_ecx: int, leaf7_ebx: int, leaf7_ecx: int, xcr0: int) -> list[str]: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def quantize_rows(*, x: int, m: int, k: int, group: int, stride: int, q: int, scale: int, total: int) -> None: ...
def stream_read(data: int, nbytes: int) -> int: ...
def hadamard(*, x: int, n: int) -> None: ...
def block_max(*, x: int, n: int, out: int) -> None: ...
def exp_sum(*, x: int, n: int, shift: float, scale: float, out: int) -> float: ...
def uniform(seed: int, stream: int, position: int) -> float: ...
def philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]: ...

class Sampler:
    def __init__(
        self,
        *,
        vocabulary: int,
        greedy: bool,
        repetition_penalty: float,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
    ) -> None: ...
    def sample(
        self,
        logits: int,
        history: int,
        history_size: int,
        banned: int,
        banned_size: int,
        stream: int,
        position: int,
        probabilities: int = 0,
    ) -> int: ...

LAYOUT_VERSION: int

class Matrix:
    @staticmethod
    def packed(*, layout: Layout, data: int, nbytes: int, bias: int) -> Matrix: ...
    @staticmethod
    def dense(*, data: int, n: int, k: int, type: int, bias: int) -> Matrix: ...

class Rope:
    def __init__(self, *, inverse_frequency: list[float], scaling: float) -> None: ...

class DecoderLayer:
    q: Matrix
    k: Matrix
    v: Matrix
    o: Matrix
    gate: Matrix
    up: Matrix
    down: Matrix
    attention_norm: int
    attention_post_norm: int
    ffn_norm: int
    ffn_post_norm: int
    q_norm: int
    k_norm: int
    qkv_order: int
    o_order: int
    ffn_order: int
    down_order: int
    window: int
    rope: int

class DecoderSpec:
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    attention_scale: float
    embedding_scale: float
    attention_softcap: float
    final_softcap: float
    activation: int
    ropes: list[Rope]
    layers: list[DecoderLayer]
    embedding: Matrix
    head: Matrix
    final_norm: int

class Sequence:
    @property
    def length(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def least_crop(self) -> int: ...
    def crop(self, length: int) -> None: ...
    def skip(self, count: int) -> None: ...
    def copy(self) -> Sequence: ...
    def held_pages(self) -> list[tuple[list[int], int, int, int]]: ...
    def read_pages(self, out: list[int]) -> None: ...
    def restore(self, *, length: int, pages: list[tuple[list[int], int, int, int]], data: list[int]) -> None: ...

KV_LAYOUT_VERSION: int

def shared_bytes(sequences: list[Sequence]) -> int: ...
def shaped_sequence(
    *,
    kv_heads: int,
    head_dim: int,
    windows: list[int],
    layers: list[tuple[int, int]],
    near_bits: int,
    by_column: bool,
    rotate: bool,
    sinks: int,
    recent: int,
) -> Sequence: ...
def attend(
    *,
    q: int,
    k: int,
    v: int,
    count: int,
    length: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    bits: tuple[int, int],
    by_column: bool,
    sinks: int,
    recent: int,
    window: int,
    softcap: float,
    out: int,
) -> None: ...

class Decoder:
    def __init__(self, spec: DecoderSpec) -> None: ...
    def new_sequence(
        self, *, layers: list[tuple[int, int]], near_bits: int, by_column: bool, rotate: bool, sinks: int, recent: int
    ) -> Sequence: ...
    def forward(
        self,
        *,
        ids: int,
        counts: list[int],
        sequences: list[Sequence],
        output: int,
        float_activations: bool,
        out: int,
    ) -> None: ...
    def logits(self, *, states: int, rows: int, float_activations: bool, out: int) -> None: ...
