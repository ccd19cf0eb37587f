"""The intrinsics as LLVM instructions and inline PTX (`intrinsics.py` says what each does).

numba reads and writes at most 8 bytes at a time by itself; a vector load or store of LLVM becomes ONE 16-byte access
(`ld.global.v4.u32`). PTX is needed only where LLVM has no word for it: packed conversions and lane exchange.
"""

from llvmlite import ir
from numba import cuda, int32, types, uint32
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F16, F32 = ir.HalfType(), ir.FloatType()
V4 = ir.VectorType(I32, 4)
LETTER = {I16: "h", I32: "r", I64: "l", F32: "f"}  # PTX's register classes


def compute_capability():
    """(major, minor) of the GPU that is being compiled for."""
    return ConfigStack().top().compute_capability


def inline_ptx(builder, text, result, args, *, effect=False):
    """Emit `text`; $0 is the result, $1… the arguments. `effect`: it must neither move nor vanish."""
    constraints = [f"={LETTER[result]}"] + [LETTER[a.type] for a in args]
    function = ir.FunctionType(result, [a.type for a in args])
    call = builder.call(ir.InlineAsm(function, text, ",".join(constraints), side_effect=effect), args)
    if effect:
        call.attributes.add("convergent")
    return call


def pointer_to(context, builder, kind, array, element):
    """Address of an argument (pointer or array) as a pointer to `element`."""
    data = array if isinstance(kind, types.CPointer) else context.make_array(kind)(context, builder, array).data
    return builder.bitcast(data, element.as_pointer(data.type.addrspace))


def at(context, builder, kind, array, index_kind, index, element):
    """Address of the `index`-th `element` behind an argument."""
    offset = context.cast(builder, index, index_kind, types.int64)
    return builder.gep(pointer_to(context, builder, kind, array, element), [offset])


def float_from(builder, kind, raw):
    """One loaded element as float32: itself, float16 extended, bfloat16 (uint16) shifted into the upper half."""
    if kind == types.float32:
        return builder.bitcast(raw, F32)
    if kind == types.float16:
        return builder.fpext(builder.bitcast(raw, F16), F32)
    return builder.bitcast(builder.shl(builder.zext(raw, I32), ir.Constant(I32, 16)), F32)


def half_bits(builder, kind, value):
    """16 bits of a float32 rounded to nearest even, as float16 or bfloat16."""
    if kind == types.float16:
        return builder.bitcast(builder.fptrunc(value, F16), I16)
    if compute_capability() >= (8, 0):
        return inline_ptx(builder, "cvt.rn.bf16.f32 $0, $1;", I16, [value])
    bits = builder.bitcast(value, I32)
    odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
    rounded = builder.add(builder.add(bits, ir.Constant(I32, 0x7FFF)), odd)
    bits = builder.select(builder.fcmp_unordered("uno", value, value), ir.Constant(I32, 0x7FFF0000), rounded)
    return builder.trunc(builder.lshr(bits, ir.Constant(I32, 16)), I16)


def half_pair(builder, kind, low, high):
    """Two float32 rounded into one uint32, `low` in the lower half: one instruction from sm_80 on."""
    if compute_capability() >= (8, 0):
        name = "f16x2" if kind == types.float16 else "bf16x2"
        return inline_ptx(builder, f"cvt.rn.{name}.f32 $0, $1, $2;", I32, [high, low])
    low, high = (builder.zext(half_bits(builder, kind, v), I32) for v in (low, high))
    return builder.or_(low, builder.shl(high, ir.Constant(I32, 16)))


def vector_load(builder, address):
    """The four uint32 of one 16-byte load."""
    vector = builder.load(address, align=16)
    return [builder.extract_element(vector, ir.Constant(I32, k)) for k in range(4)]


def vector_store(builder, address, words):
    """Four uint32 by one 16-byte store."""
    vector = ir.Constant(V4, ir.Undefined)
    for k, word in enumerate(words):
        vector = builder.insert_element(vector, word, ir.Constant(I32, k))
    builder.store(vector, address, align=16)


@intrinsic
def float_bits(typing, x):
    def emit(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.uint32(types.float32), emit


@intrinsic
def bits_float(typing, bits):
    def emit(context, builder, signature, args):
        return builder.bitcast(args[0], F32)

    return types.float32(types.uint32), emit


@intrinsic
def multiply(typing, a, b):
    def emit(context, builder, signature, args):
        return inline_ptx(builder, "mul.rn.f32 $0, $1, $2;", F32, args)

    return types.float32(types.float32, types.float32), emit


@intrinsic
def quotient(typing, a, b):
    def emit(context, builder, signature, args):
        return inline_ptx(builder, "div.rn.f32 $0, $1, $2;", F32, args)

    return types.float32(types.float32, types.float32), emit


@intrinsic
def reciprocal(typing, x):
    def emit(context, builder, signature, args):
        return inline_ptx(builder, "rcp.rn.f32 $0, $1;", F32, args)

    return types.float32(types.float32), emit


@intrinsic
def next_code(typing, word, code, s, boundary):
    def emit(context, builder, signature, args):
        text = "{ .reg .pred p; mad.lo.u32 $0, $1, 16, $2; setp.gt.f32 p, $3, $4; @p add.u32 $0, $0, 1; }"
        function = ir.FunctionType(I32, [I32, I32, F32, F32])
        return builder.call(ir.InlineAsm(function, text, "=&r,r,r,f,f"), args)

    return types.uint32(types.uint32, types.uint32, types.float32, types.float32), emit


@intrinsic
def load(typing, x, i):
    def emit(context, builder, signature, args):
        element = F32 if x.dtype == types.float32 else I16
        raw = builder.load(at(context, builder, x, args[0], i, args[1], element))
        return float_from(builder, x.dtype, raw)

    return types.float32(x, i), emit


@intrinsic
def store4(typing, data, i, word):
    def emit(context, builder, signature, args):
        value = context.cast(builder, args[2], word, types.uint32)
        builder.store(value, at(context, builder, data, args[0], i, args[1], I32), align=4)
        return context.get_dummy_value()

    return types.void(data, i, word), emit


@intrinsic
def load8(typing, x, i, raw):
    def emit(context, builder, signature, args):
        wide = 8 // per_store(x.dtype)  # 16-byte words in eight elements
        first = builder.mul(context.cast(builder, args[1], i, types.int64), ir.Constant(I64, wide))
        base = builder.gep(pointer_to(context, builder, x, args[0], V4), [first])
        target = pointer_to(context, builder, raw, args[2], I32)
        for k in range(wide):
            for j, word in enumerate(vector_load(builder, builder.gep(base, [ir.Constant(I64, k)]))):
                builder.store(word, builder.gep(target, [ir.Constant(I64, 4 * k + j)]))
        return context.get_dummy_value()

    return types.void(x, i, raw), emit


@intrinsic
def widen8(typing, x, raw, values):
    def emit(context, builder, signature, args):
        source = pointer_to(context, builder, raw, args[1], I32)
        target = pointer_to(context, builder, values, args[2], F32)
        per_word = 8 // (8 // per_store(x.dtype) * 4)
        for k in range(8):
            word = builder.load(builder.gep(source, [ir.Constant(I64, k // per_word)]))
            if per_word == 2:
                word = builder.trunc(builder.lshr(word, ir.Constant(I32, 16 * (k % 2))), I16)
            builder.store(float_from(builder, x.dtype, word), builder.gep(target, [ir.Constant(I64, k)]))
        return context.get_dummy_value()

    return types.void(x, raw, values), emit


@intrinsic
def store(typing, out, i, value):
    def emit(context, builder, signature, args):
        number = context.cast(builder, args[2], value, types.float32)
        wide = out.dtype == types.float32
        bits = builder.bitcast(number, I32) if wide else half_bits(builder, out.dtype, number)
        builder.store(bits, at(context, builder, out, args[0], i, args[1], I32 if wide else I16))
        return context.get_dummy_value()

    return types.void(out, i, value), emit


@intrinsic
def store_pair(typing, out, i, low, high):
    def emit(context, builder, signature, args):
        low, high = (context.cast(builder, args[j], signature.args[j], types.float32) for j in (2, 3))
        if out.dtype == types.float32:
            words = [builder.bitcast(low, I32), builder.bitcast(high, I32)]
        else:
            words = [half_pair(builder, out.dtype, low, high)]
        vector = ir.Constant(ir.VectorType(I32, len(words)), ir.Undefined)
        for k, word in enumerate(words):
            vector = builder.insert_element(vector, word, ir.Constant(I32, k))
        builder.store(vector, at(context, builder, out, args[0], i, args[1], vector.type), align=4 * len(words))
        return context.get_dummy_value()

    return types.void(out, i, low, high), emit


def per_store(kind):
    """Elements of `kind` in 16 bytes."""
    return 4 if kind == types.float32 else 8


@intrinsic
def in_16_bytes(typing, out):
    def emit(context, builder, signature, args):
        return ir.Constant(I64, per_store(out.dtype))

    return types.int64(out), emit


@intrinsic
def load_codes(typing, packed, i, out):
    def emit(context, builder, signature, args):
        element = ir.IntType(4 * per_store(out.dtype))  # 4 bits a code
        raw = builder.load(at(context, builder, packed, args[0], i, args[1], element), align=element.width // 8)
        return raw if element == I32 else builder.zext(raw, I32)

    return types.uint32(packed, i, out), emit


@intrinsic
def store16(typing, out, i, values):
    def emit(context, builder, signature, args):
        source = pointer_to(context, builder, values, args[2], F32)
        v = [builder.load(builder.gep(source, [ir.Constant(I64, k)])) for k in range(per_store(out.dtype))]
        if out.dtype == types.float32:
            words = [builder.bitcast(value, I32) for value in v]
        else:
            words = [half_pair(builder, out.dtype, v[k], v[k + 1]) for k in range(0, 8, 2)]
        vector_store(builder, at(context, builder, out, args[0], i, args[1], V4), words)
        return context.get_dummy_value()

    return types.void(out, i, values), emit


@intrinsic
def max_magnitude(typing, bits, value):
    def emit(context, builder, signature, args):
        if compute_capability() >= (8, 0):
            text = "{ .reg .f32 a, m; mov.b32 m, $1; abs.f32 a, $2; max.NaN.f32 m, m, a; mov.b32 $0, m; }"
            return inline_ptx(builder, text, I32, args)
        other = builder.and_(builder.bitcast(args[1], I32), ir.Constant(I32, 0x7FFFFFFF))
        return builder.select(builder.icmp_unsigned(">", other, args[0]), other, args[0])

    return types.uint32(types.uint32, types.float32), emit


def max_magnitude_of(builder, kind, words):
    """The bits of the greatest magnitude among the elements (of type `kind`) of some uint32, as float32."""
    wide = kind == types.float32
    mask = ir.Constant(I32, 0x7FFFFFFF if wide else 0x7FFF7FFF)
    words = [builder.and_(word, mask) for word in words]
    if wide:
        return greatest_of(builder, words)
    if compute_capability() >= (8, 0):
        name = "f16x2" if kind == types.float16 else "bf16x2"
        packed = words[0]
        for word in words[1:]:
            packed = inline_ptx(builder, f"max.NaN.{name} $0, $1, $2;", I32, [packed, word])
        words = [packed]
    halves = [builder.trunc(builder.lshr(w, ir.Constant(I32, shift)), I16) for w in words for shift in (0, 16)]
    return greatest_of(builder, [builder.bitcast(float_from(builder, kind, h), I32) for h in halves])


def words_of(context, builder, kind, array, count):
    """The first `count` uint32 of a local array."""
    source = pointer_to(context, builder, kind, array, I32)
    return [builder.load(builder.gep(source, [ir.Constant(I64, k)])) for k in range(count)]


@intrinsic
def max_magnitude8(typing, x, raw):
    def emit(context, builder, signature, args):
        return max_magnitude_of(builder, x.dtype, words_of(context, builder, raw, args[1], 32 // per_store(x.dtype)))

    return types.uint32(x, raw), emit


@intrinsic
def max_magnitude_64_bytes(typing, x, raw):
    def emit(context, builder, signature, args):
        return max_magnitude_of(builder, x.dtype, words_of(context, builder, raw, args[1], 16))

    return types.uint32(x, raw), emit


@intrinsic
def widen(typing, x, raw, e):
    def emit(context, builder, signature, args):
        wide = x.dtype == types.float32
        e_64 = context.cast(builder, args[2], e, types.int64)
        source = pointer_to(context, builder, raw, args[1], F32 if wide else I16)
        return float_from(builder, x.dtype, builder.load(builder.gep(source, [e_64])))

    return types.float32(x, raw, e), emit


@intrinsic
def element_bits(typing, x, i):
    def emit(context, builder, signature, args):
        element = I32 if x.dtype == types.float32 else I16
        raw = builder.load(at(context, builder, x, args[0], i, args[1], element))
        return raw if element == I32 else builder.zext(raw, I32)

    return types.uint32(x, i), emit


@intrinsic
def store_codes(typing, packed, i, x, words):
    def emit(context, builder, signature, args):
        count = per_store(x.dtype) // 2  # uint32 with the codes of 64 bytes of x
        vector = ir.Constant(ir.VectorType(I32, count), ir.Undefined)
        for k, word in enumerate(words_of(context, builder, words, args[3], count)):
            vector = builder.insert_element(vector, word, ir.Constant(I32, k))
        address = at(context, builder, packed, args[0], i, args[1], vector.type)
        builder.store(vector, address, align=4 * count)
        return context.get_dummy_value()

    return types.void(packed, i, x, words), emit


def greatest_of(builder, words):
    """The greatest of some uint32."""
    greatest = words[0]
    for word in words[1:]:
        greatest = builder.select(builder.icmp_unsigned(">", word, greatest), word, greatest)
    return greatest


@intrinsic
def pair_at(typing, shared, word, byte, lane_bytes):
    def emit(context, builder, signature, args):
        # bytes of the offset, lowest first: 4 lane, the chosen byte of `word`, 0, 0 (of lane_bytes: 4, 6, 7)
        selector = builder.add(context.cast(builder, args[2], byte, types.uint32), ir.Constant(I32, 0x760))
        selector = builder.or_(builder.shl(selector, ir.Constant(I32, 4)), ir.Constant(I32, 4))
        offset = inline_ptx(builder, "prmt.b32 $0, $1, $2, $3;", I32, [args[1], args[3], selector])
        base = pointer_to(context, builder, shared, args[0], ir.IntType(8))
        address = builder.gep(base, [builder.zext(offset, I64)])
        return builder.load(builder.bitcast(address, I32.as_pointer(address.type.addrspace)), align=4)

    return types.uint32(shared, types.uint32, byte, types.uint32), emit


@intrinsic
def pair_selected(typing, shared, word, selector, lane_bytes):
    def emit(context, builder, signature, args):
        offset = inline_ptx(builder, "prmt.b32 $0, $1, $2, $3;", I32, [args[1], args[3], args[2]])
        base = pointer_to(context, builder, shared, args[0], ir.IntType(8))
        address = builder.gep(base, [builder.zext(offset, I64)])
        return builder.load(builder.bitcast(address, I32.as_pointer(address.type.addrspace)), align=4)

    return types.uint32(shared, types.uint32, types.uint32, types.uint32), emit


@intrinsic
def load16(typing, data, i, words, first):
    def emit(context, builder, signature, args):
        vector = vector_load(builder, at(context, builder, data, args[0], i, args[1], V4))
        offset = context.cast(builder, args[3], first, types.int64)
        target = builder.gep(pointer_to(context, builder, words, args[2], I32), [offset])
        for k, word in enumerate(vector):
            builder.store(word, builder.gep(target, [ir.Constant(I64, k)]))
        return context.get_dummy_value()

    return types.void(data, i, words, first), emit


@intrinsic
def store16_words(typing, data, i, words, first):
    def emit(context, builder, signature, args):
        offset = context.cast(builder, args[3], first, types.int64)
        source = builder.gep(pointer_to(context, builder, words, args[2], I32), [offset])
        values = [builder.load(builder.gep(source, [ir.Constant(I64, k)])) for k in range(4)]
        vector_store(builder, at(context, builder, data, args[0], i, args[1], V4), values)
        return context.get_dummy_value()

    return types.void(data, i, words, first), emit


@intrinsic
def pack_half(typing, low, high):
    def emit(context, builder, signature, args):
        return half_pair(builder, types.float16, *args)

    return types.uint32(types.float32, types.float32), emit


@intrinsic
def has_float16_range(typing, x):
    def emit(context, builder, signature, args):
        return ir.Constant(ir.IntType(1), int(x.dtype == types.float16))

    return types.boolean(x), emit


def tensor_core_step(context, builder, kind, sums, first, first_kind, fragments, name):
    """mma.sync of `fragments` (four of A, two of B) added to the four float32 of `sums` from `first` on."""
    offset = context.cast(builder, first, first_kind, types.int64)
    base = builder.gep(pointer_to(context, builder, kind, sums, F32), [offset])
    places = [builder.gep(base, [ir.Constant(I64, k)]) for k in range(4)]
    operands = [*fragments, *(builder.load(place) for place in places)]
    text = (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"
        " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
    )
    four = ir.LiteralStructType([F32] * 4)
    constraints = ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4)
    function = ir.FunctionType(four, [value.type for value in operands])
    result = builder.call(ir.InlineAsm(function, text, constraints), operands)
    result.attributes.add("convergent")
    for k, place in enumerate(places):
        builder.store(builder.extract_value(result, k), place)
    return context.get_dummy_value()


@intrinsic
def multiply_16x8x16(typing, sums, first, a0, a1, a2, a3, b0, b1):
    def emit(context, builder, signature, args):
        return tensor_core_step(context, builder, sums, *args[:2], first, args[2:], "f16")

    u32 = types.uint32
    return types.void(sums, first, u32, u32, u32, u32, u32, u32), emit


def shared_address(context, builder, kind, array):
    """The 32-bit address of shared memory in its own address space, as PTX's cp.async and ldmatrix take it."""
    pointer = context.make_array(kind)(context, builder, array).data
    return builder.ptrtoint(builder.addrspacecast(pointer, pointer.type.pointee.as_pointer(3)), I32)


@intrinsic
def pinned(typing, shared, number):
    def emit(context, builder, signature, args):
        upper = builder.trunc(builder.lshr(args[1], ir.Constant(I64, 32)), I32)
        address = builder.add(shared_address(context, builder, shared, args[0]), upper)
        array = context.make_array(shared)(context, builder, args[0])
        kind = array.data.type
        in_shared = builder.inttoptr(address, kind.pointee.as_pointer(3))
        array.data = builder.addrspacecast(in_shared, kind)
        return array._getvalue()

    return shared(shared, types.int64), emit


@intrinsic
def shifted(typing, number, by):
    def emit(context, builder, signature, args):
        return builder.lshr(*args)

    return types.int32(types.int32, types.int32), emit


def command(builder, text, constraints, args, result=None):
    """Emit `text` where it stands: it reads or writes memory that the compiler cannot see it touch."""
    result = ir.VoidType() if result is None else result
    function = ir.FunctionType(result, [a.type for a in args])
    call = builder.call(ir.InlineAsm(function, text, constraints, side_effect=True), args)
    call.attributes.add("convergent")
    return call


@intrinsic
def shared_start(typing, shared):
    def emit(context, builder, signature, args):
        return shared_address(context, builder, shared, args[0])

    return types.int32(shared), emit


@intrinsic
def copy16(typing, shared, address, data, i):
    def emit(context, builder, signature, args):
        target = context.cast(builder, args[1], address, types.int32)
        source = builder.ptrtoint(at(context, builder, data, args[2], i, args[3], V4), I64)
        command(builder, "cp.async.cg.shared.global [$0], [$1], 16;", "r,l,~{memory}", [target, source])
        return context.get_dummy_value()

    return types.void(shared, address, data, i), emit


@intrinsic
def copy16_or_zeros(typing, shared, address, data, i, there):
    def emit(context, builder, signature, args):
        target = context.cast(builder, args[1], address, types.int32)
        source = builder.ptrtoint(at(context, builder, data, args[2], i, args[3], V4), I64)
        size = builder.select(args[4], ir.Constant(I32, 16), ir.Constant(I32, 0))
        command(builder, "cp.async.cg.shared.global [$0], [$1], 16, $2;", "r,l,r,~{memory}", [target, source, size])
        return context.get_dummy_value()

    return types.void(shared, address, data, i, types.boolean), emit


@intrinsic
def copies_go(typing):
    def emit(context, builder, signature, args):
        command(builder, "cp.async.commit_group;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def copies_done(typing, under_way):
    if not isinstance(under_way, types.IntegerLiteral):
        return None
    count = under_way.literal_value

    def emit(context, builder, signature, args):
        command(builder, f"cp.async.wait_group {count};", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(under_way), emit


def to_the_grid(text):
    """An intrinsic (): `text`, an instruction for whole launches, which Hopper has and older GPUs can do without."""

    @intrinsic
    def tell(typing):
        def emit(context, builder, signature, args):
            if compute_capability() >= (9, 0):
                command(builder, text, "~{memory}", [])
            return context.get_dummy_value()

        return types.void(), emit

    return tell


kernel_before_done = to_the_grid("griddepcontrol.wait;")
next_kernel_may_start = to_the_grid("griddepcontrol.launch_dependents;")


@intrinsic
def sync_threads(typing, number, count):
    def emit(context, builder, signature, args):
        number_32, count_32 = (context.cast(builder, args[j], signature.args[j], types.int32) for j in (0, 1))
        command(builder, "bar.sync $0, $1;", "r,r,~{memory}", [number_32, count_32])
        return context.get_dummy_value()

    return types.void(number, count), emit


@intrinsic
def copies_seen(typing):
    def emit(context, builder, signature, args):
        command(builder, "fence.proxy.async.shared::cta;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def sync_warp(typing):
    def emit(context, builder, signature, args):
        command(builder, "bar.warp.sync 0xffffffff;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), emit


def four_words(text):
    """An intrinsic (shared, address, words, first): words[first:first + 4] are what `text` reads at an address."""

    @intrinsic
    def read(typing, shared, address, words, first):
        def emit(context, builder, signature, args):
            source = context.cast(builder, args[1], address, types.int32)
            four = command(builder, text, "=r,=r,=r,=r,r", [source], ir.LiteralStructType([I32] * 4))
            offset = context.cast(builder, args[3], first, types.int64)
            target = builder.gep(pointer_to(context, builder, words, args[2], I32), [offset])
            for k in range(4):
                builder.store(builder.extract_value(four, k), builder.gep(target, [ir.Constant(I64, k)]))
            return context.get_dummy_value()

        return types.void(shared, address, words, first), emit

    return read


load16_shared = four_words("ld.shared.v4.u32 {$0, $1, $2, $3}, [$4];")
load_matrices = four_words("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {$0, $1, $2, $3}, [$4];")


@intrinsic
def pack_like(typing, x, low, high):
    def emit(context, builder, signature, args):
        return half_pair(builder, x.dtype, *args[1:])

    return types.uint32(x, types.float32, types.float32), emit


@intrinsic
def multiply_tile(typing, x, sums, first, a0, a1, a2, a3, b0, b1):
    def emit(context, builder, signature, args):
        name = "f16" if x.dtype == types.float16 else "bf16"
        return tensor_core_step(context, builder, sums, *args[1:3], first, args[3:], name)

    u32 = types.uint32
    return types.void(x, sums, first, u32, u32, u32, u32, u32, u32), emit


SWIZZLED_ROWS = (
    64 | 1 << 30
)  # upper half of a matrix descriptor: 1,024 bytes from eight rows to eight, 128-byte swizzle


def warpgroup_steps(count, name):
    """PTX: set under way products ($0…) = A (16 words a lane, after them) times B, whose descriptor comes last.

    Four steps of 16 columns; each moves B's start by 32 bytes (the descriptor's lower half, an operand, counts by 16).
    """
    sums = ", ".join(f"${k}" for k in range(4 * count))
    lines = [
        "{ .reg .pred fresh, on; .reg .b64 b; .reg .b32 low, high, zero;",
        "mov.b32 zero, 0; setp.ne.b32 fresh, zero, 0; setp.eq.b32 on, zero, 0;",
        f"mov.b32 high, {SWIZZLED_ROWS}; mov.b32 low, ${4 * count + 16}; wgmma.fence.sync.aligned;",
    ]
    for step in range(4):
        a = ", ".join(f"${4 * count + 4 * step + k}" for k in range(4))
        shape, adds = f"m64n{8 * count}k16.f32.{name}.{name}", "on" if step else "fresh"
        lines.append(f"mov.b64 b, {{low, high}}; add.u32 low, low, 2; wgmma.mma_async.sync.aligned.{shape}")
        lines.append(f"{{{sums}}}, {{{a}}}, b, {adds}, 1, 1, 0;")
    return " ".join([*lines, "wgmma.commit_group.sync.aligned; }"])


@intrinsic
def start_products(typing, x, shared, products, a, b_at, eights):
    if not isinstance(eights, types.IntegerLiteral):
        return None
    count = eights.literal_value

    def emit(context, builder, signature, args):
        at_16 = builder.lshr(builder.and_(args[4], ir.Constant(I32, 0x3FFFF)), ir.Constant(I32, 4))
        low = builder.or_(at_16, ir.Constant(I32, 1 << 16))
        fragments = words_of(context, builder, a, args[3], 16)
        text = warpgroup_steps(count, "f16" if x.dtype == types.float16 else "bf16")
        constraints = ",".join(["=&f"] * 4 * count + ["r"] * 17)
        sums = command(builder, text, constraints, [*fragments, low], ir.LiteralStructType([F32] * 4 * count))
        store_floats(context, builder, products, args[2], sums, 4 * count)
        return context.get_dummy_value()

    return types.void(x, shared, products, a, types.int32, eights), emit


def store_floats(context, builder, kind, array, values, count):
    """The floats of an LLVM structure into a local array."""
    base = pointer_to(context, builder, kind, array, F32)
    for k in range(count):
        builder.store(builder.extract_value(values, k), builder.gep(base, [ir.Constant(I64, k)]))


@intrinsic
def products_there(typing, products, eights):
    if not isinstance(eights, types.IntegerLiteral):
        return None
    count = 4 * eights.literal_value

    def emit(context, builder, signature, args):
        command(builder, "wgmma.wait_group.sync.aligned 0;", "~{memory}", [])
        base = pointer_to(context, builder, products, args[0], F32)
        values = [builder.load(builder.gep(base, [ir.Constant(I64, k)])) for k in range(count)]
        constraints = ",".join(["=f"] * count + [str(k) for k in range(count)])  # nobody reads them before this
        same = command(builder, "// products", constraints, values, ir.LiteralStructType([F32] * count))
        store_floats(context, builder, products, args[0], same, count)
        return context.get_dummy_value()

    return types.void(products, eights), emit


def on_barrier(text):
    """An intrinsic (shared, i, number): `text` does something to the mbarrier in words i and i + 1."""

    @intrinsic
    def act(typing, shared, i, number):
        def emit(context, builder, signature, args):
            offset = builder.shl(context.cast(builder, args[1], i, types.int32), ir.Constant(I32, 2))
            address = builder.add(shared_address(context, builder, shared, args[0]), offset)
            command(builder, text, "r,r,~{memory}", [address, context.cast(builder, args[2], number, types.int32)])
            return context.get_dummy_value()

        return types.void(shared, i, number), emit

    return act


barrier_init = on_barrier("mbarrier.init.shared::cta.b64 [$0], $1;")
barrier_arrive = on_barrier("mbarrier.arrive.shared::cta.b64 _, [$0], $1;")
barrier_wait = on_barrier(
    "{ .reg .pred done; AGAIN: mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1; @!done bra AGAIN; }"
)


@intrinsic
def barriers_ready(typing):
    def emit(context, builder, signature, args):
        command(builder, "fence.mbarrier_init.release.cluster;", "~{memory}", [])
        return context.get_dummy_value()

    return types.void(), emit


@intrinsic
def copy_bulk(typing, shared, to, data, i, count, barrier):
    def emit(context, builder, signature, args):
        base = shared_address(context, builder, shared, args[0])

        def address(value, kind):
            return builder.add(base, builder.shl(context.cast(builder, value, kind, types.int32), ir.Constant(I32, 2)))

        source = builder.ptrtoint(at(context, builder, data, args[2], i, args[3], V4), I64)
        size = context.cast(builder, args[4], count, types.int32)
        text = (
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [$3], $2;"
            " cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], $2, [$3];"
        )
        places = address(args[1], to), source, size, address(args[5], barrier)
        command(builder, text, "r,l,r,r,~{memory}", places)
        return context.get_dummy_value()

    return types.void(shared, to, data, i, count, barrier), emit


EVERY_LANE = 0xFFFFFFFF


@cuda.jit(device=True, inline="always")
def max_across(value, lanes):
    for offset in (16, 8, 4, 2, 1):
        if offset < lanes:
            value = max(value, uint32(cuda.shfl_xor_sync(EVERY_LANE, int32(value), offset)))
    return value


@cuda.jit(device=True, inline="always")
def sum_across(value, lanes):
    for offset in (16, 8, 4, 2, 1):
        if offset < lanes:
            value += cuda.shfl_xor_sync(EVERY_LANE, value, offset)
    return value


@cuda.jit(device=True, inline="always")
def from_lane(value, lane):
    return cuda.shfl_sync(EVERY_LANE, value, lane)
