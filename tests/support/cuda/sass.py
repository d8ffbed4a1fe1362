"""Checks of Hopper's machine code that no compiler message replaces.

A warpgroup product (HGMMA) reads its left operand from registers and runs on after it was issued,
until WARPGROUP.DEPBAR waits for it. The hardware does not protect its registers meanwhile: ptxas
must, and ptxas 12.8 and 13.0 do not always.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
# Instructions whose first general register is an operand, not a result.
NO_RESULT = (
    "ST LDGSTS RED ISETP FSETP HSETP2 PLOP3 R2P R2UR U BAR BRA BRX BSSY BSYNC CALL RET EXIT NOP MEMBAR "
    "FENCE ERRBAR CCTL DEPBAR LDGDEPBAR WARP ENDCOLLECTIVE NANOSLEEP"
).split()
# Registers that a value takes by the opcode's suffix; one otherwise.
WIDTHS = {"128": 4, "64": 2, "WIDE": 2}


@dataclass
class Instruction:
    """One machine instruction; ``reads`` and ``writes`` are sets of general registers."""

    address: int
    predicate: str | None
    opcode: str
    operands: list[str]

    def __post_init__(self):
        self.name, *self.suffixes = self.opcode.split(".")
        self.is_product = self.name == "HGMMA"
        self.is_wait = self.opcode.startswith("WARPGROUP.DEPBAR") and self.operands[-1] == "0x0"
        general = [o for o in self.operands if not re.fullmatch(r"!?U?P[\dT]", o)]
        stores = any(self.name.startswith(name) for name in NO_RESULT)
        result = general[0] if general and not stores else ""
        self.writes = registers(result, self._result_width())
        sources = general[1:] if self.writes or result == "RZ" else general
        self.left = registers(sources[0], 4) if self.is_product else set()
        self.reads = set().union(*(self._read(o, i) for i, o in enumerate(sources)))

    def _result_width(self) -> int:
        if self.is_product:  # m64nN: N / 2 float32 sums a thread
            return int(self.suffixes[0].split("x")[1]) // 2
        if self.name == "HMMA":
            return 4
        if self.name == "CS2R":
            return 1 if "32" in self.suffixes else 2
        if self.name == "LDSM":
            return int(self.suffixes[-1]) if self.suffixes[-1].isdecimal() else 1
        return max((WIDTHS.get(suffix, 1) for suffix in self.suffixes), default=1)

    def _read(self, operand: str, position: int) -> set[int]:
        if self.is_product:
            return registers(operand, 4 if position == 0 else self._result_width())
        if operand.startswith("["):  # an address
            width = 2 if ".64" in operand else 1
        elif "WIDE" in self.suffixes and position < 2:  # of a product only the addend is as wide
            width = 1
        elif self.name == "HMMA" and position == 1:  # its right operand: 16 rows of 8 columns
            width = 2
        else:  # a stored value is as wide as the opcode says
            width = self._result_width()
        return set().union(*(registers(r, width) for r in re.findall(r"\bR\d+", operand)))

    def __str__(self) -> str:
        return f"/*{self.address:04x}*/ {self.opcode} {', '.join(self.operands)}"


def registers(operand: str, count: int) -> set[int]:
    found = re.match(r"[-~|!]*R(\d+)\b", operand)
    return set(range(int(found[1]), int(found[1]) + count)) if found else set()


def parse(code: str) -> list[Instruction]:
    """The instructions of one function as ``cuobjdump -sass`` prints it."""
    return [
        Instruction(int(address, 16), predicate, opcode, [o.strip() for o in rest.split(",") if o])
        for address, predicate, opcode, rest in LINE.findall(code)
    ]


def successors(code: list[Instruction]) -> list[list[int]]:
    """For each instruction, the indices of possible successors; calls are assumed to return."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    result = []
    for i, instruction in enumerate(code):
        following = []
        if instruction.name == "BRA":
            following.append(index[int(instruction.operands[-1], 16)])
        conditional = instruction.predicate or len(instruction.operands) > 1
        if instruction.name not in ("BRA", "EXIT", "RET") or conditional:
            following.append(i + 1)
        result.append([j for j in following if j < len(code)])
    return result


def faults(text: str) -> list[str]:
    """Errors in the registers of warpgroup products in a function.

    A left operand must come from one instruction only: if two can have written it, depending on the
    path that was taken, the second one has overwritten what a later iteration needs. And nothing may
    touch the sums, or write the left operand, before the wait.
    """
    code = parse(text)
    follow = successors(code)
    return [*_overwritten(code, follow), *_in_flight(code, follow)]


def _overwritten(code: list[Instruction], follow: list[list[int]]) -> Iterator[str]:
    relevant = set().union(*(i.left for i in code))
    # Per instruction and register, the instructions whose result may still be in it.
    reaching: list[dict[int, set[int]]] = [{} for _ in code]
    pending = list(range(len(code)))
    while pending:
        i = pending.pop()
        after = {register: set(origins) for register, origins in reaching[i].items()}
        for register in code[i].writes & relevant:
            kept = after.get(register, set()) if code[i].predicate else set()
            after[register] = kept | {i}
        for j in follow[i]:
            grown = False
            for register, origins in after.items():
                known = reaching[j].setdefault(register, set())
                grown |= not origins <= known
                known |= origins
            if grown:
                pending.append(j)
    for i, product in enumerate(code):
        for register in sorted(product.left):
            origins = reaching[i].get(register, set())
            if len(origins) != 1:
                written = " or ".join(str(code[j]) for j in sorted(origins)) or "nothing"
                yield f"R{register} of {product} was written by {written}"


def _in_flight(code: list[Instruction], follow: list[list[int]]) -> Iterator[str]:
    for i, product in enumerate(code):
        if not product.is_product:
            continue
        seen, pending = set(), list(follow[i])
        while pending:
            j = pending.pop()
            if j in seen or code[j].is_wait:
                continue
            seen.add(j)
            pending += follow[j]
            touched = code[j].writes & (product.writes | product.left)
            if code[j].is_product:
                # Products of one chain add to the same sums, in order.
                touched -= product.writes if code[j].writes == product.writes else set()
            else:
                touched |= code[j].reads & product.writes
            if touched:
                names = ", ".join(f"R{register}" for register in sorted(touched))
                yield f"{code[j]} touches {names} while {product} is in flight"
