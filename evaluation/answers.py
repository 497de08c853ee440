"""What an answer says: the number, the letter or the program in a text as models write it.

Nothing here knows which answer is right, and nothing runs code. Any text is taken; where it holds
no answer, None says so. Thinking is never the answer.
"""
import ast
import builtins
import functools
import re
import textwrap
import unicodedata
import warnings
from decimal import Decimal, InvalidOperation

# Tags in quotes are somebody's string.
THOUGHT = re.compile(r"""(?:<(/?)(?:think|thinking|thought|reasoning)>|\[(/?)THINK\])(?!["'`])""",
                     re.IGNORECASE)
END = re.compile(r"""<(?:\|(?:end_?of_?text|im_end|eot_id|eom_id|end|fim_pad|file_sep)\|"""
                 r"""|｜end▁of▁sentence｜|eos|end_of_turn|/s)>(?!["'])""")
NEXT = re.compile(r"\n(?:#{1,6} |\*\*)?(?:Question|Q|Human|User)(?: \d+)?(?:\*\*)?:")
DASHES = dict.fromkeys((*range(0x2010, 0x2016), 0x2212, 0xfe58, 0xfe63, 0xff0d), "-")
SPACES = dict.fromkeys((0xa0, *range(0x2000, 0x200b), 0x202f, 0x205f, 0x3000), " ")
UNSEEN = dict.fromkeys((0xad, *range(0x200b, 0x2010), *range(0x202a, 0x202f),
                        *range(0x2060, 0x206a), 0xfeff))
LONGEST = 30_000  # characters from the end that a number or a letter is looked for in
FULL_WIDTH = {i: i - 0xfee0 for i in range(0xff01, 0xff5f)}


def answered(text: str) -> str:
    """The text before its end token, if that is left in it, and after its thinking: what follows
    the last closing tag, without a span that is still open at the end.
    """
    if "<" in text and (end := END.search(text)) and not (end[0] == "</s>" and "<s>" in text):
        text = text[:end.start()]
    small = text.lower()
    if not ("think" in small or "thought>" in small or "reasoning>" in small):
        return text
    tags = [(tag.start(), tag.end(), "/" in tag[0]) for tag in THOUGHT.finditer(text)]
    begin = max((end for _, end, closes in tags if closes), default=0)
    return text[begin:min((start for start, *_ in tags if start >= begin), default=None)]


def of_own_turn(read):
    """`read` of the answer alone: no thinking, and no next question that the model put to itself,
    unless all that it says stands behind that, as in an answer that restates the question.
    """
    @functools.wraps(read)
    def reader(text: str, *rest):
        text = answered(text).lstrip()
        turn = NEXT.split(text, 1)[0]
        found = read(turn[-LONGEST:], *rest)
        return read(text[-LONGEST:], *rest) if found[0] is None and turn != text else found
    return reader


# ---------------------------------------------------------------- a number

ASCII = FULL_WIDTH | DASHES | SPACES | UNSEEN
THIN = re.compile(rf"(?<=\d)[{''.join(map(chr, SPACES))}](?=\d{{3}}(?!\d))")
TEX_COMMA = re.compile(r"(?<=\d)(?:\{,\}|~|,?\\[,;:! ])(?=\d{3})")
POWER = re.compile(r"(?<=[a-zA-Z}])\^\{?[23]\}?")  # of a unit
CURRENCY = r"(?:\\?[$€£¥₹]\s?)?"
GROUPED = r"\d{1,3}(?:,\d\d){0,4}(?:,\d{3})+(?!\d)"  # 1,234,567, and Indian 12,34,567
VALUE = rf"(?:(?:{GROUPED}|\d+)(?:\.\d+)?|(?<!\w)\.\d+)"
# A dash is a sign unless it joins: no negative number in 10-5, (10-30) or 3%-5%.
NUMBER = re.compile(rf"(?:(?<![\w)\]%.])-)?{CURRENCY}(?:(?<=[$€£¥₹])-)?{VALUE}")
DRESS = r"""(?:[\s*_`"'(\[{<=:≈~$€£¥₹]|\\[($\[]|\\(?!d?frac)[A-Za-z]+){0,60}"""
DRESSED = rf"{DRESS}((?:-\s?)?{CURRENCY}(?:\d{{1,3}}(?: \d{{3}})+(?!\d)(?:\.\d+)?|{VALUE}))"
MARKED = re.compile(rf"####{DRESSED}")
LABELLED = re.compile(rf"####[^\d\n]{{0,60}}?(?:\b(?:is|are|answer|equals)\b|[=:≈]){DRESSED}", re.I)
BOXED = re.compile(rf"\\boxed\s?\{{{DRESSED}")
# Behind a number: the rest of a sum, up to what it comes to.
SUM = re.compile(r"[ *$]*(?:[a-zA-Z]+ )?(?:[-+*/x×÷]|\\(?:times|cdot|div))[ $\\(]*[\d.]"
                 rf"(?:(?!\. )[^\n=}}]){{0,60}}(?:=(?:(?!\. )[^\n=}}]){{0,60}}){{0,4}}={DRESSED}")
# The form that is asked for, as the last word.
FINAL = re.compile(r"####\s*(-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+))\s*\Z")
HEADING = re.compile(r"####[ *]*(\d+)[.)] *[^\W\d]")
# In small letters. STATED: "the answer is N". ENDING: what may follow its unit, neither another
# number, as in "5 more than 3" and "3, 4 or 5", nor at once the next step of a calculation.
STATED = re.compile(rf"answer[\"'*_]*(?: (?:is|would be|=)|\s?[:=>])"
                    rf"(?: (?:thus|therefore|then|indeed))?:?{DRESSED}")
ENDING = re.compile(r"(?:[\s/]?(?:[a-z]+\b|\\?[%$°)\]])){0,4}"
                    r"(?: (?:in|for|per|over|every|each) \d+ [a-z]+)?[*_`\"')\]}$]*"
                    r"(?:[.!;]?[ \t]*(?:\n(?![^\n]*=)|\Z)|[.!;] (?!\$?\d[^\n]*=)|[ \t]*\("
                    r"| (?:because|since|as)\b|,(?! ?(?:\d|(?:or|and|but)\b)))")
DOUBT = re.compile(
    r"\b(?:wait|actually|mistake|correct(?:ion|ed)|sorry|instead|however|wrong|should be)\b|\bno,"
    r"|\b(?:so|therefore|thus|hence|total|altogether)\b(?=[^.\n]{0,80}\d)"
    r"|\d[^.\n]{0,80}\b(?:total|altogether)\b")


def number(text: str) -> Decimal | None:
    """The value of a number as people write it: 18, 18.0 and $18 are the same, 1,000 is 1000."""
    try:
        return Decimal(re.sub(r"[\s,$\\€£¥₹]", "", text))
    except InvalidOperation:
        return None


def plain(text: str) -> str:
    """The text with ASCII's digits, dashes and spaces, and commas between thousands."""
    if not text.isascii():
        text = THIN.sub(",", text).translate(ASCII)
    if "^" in text:
        text = POWER.sub("", text)
    return TEX_COMMA.sub(",", text) if "\\" in text or "{" in text else text


def reference(answer: str) -> Decimal | None:
    """The number marked in an answer of GSM8K's file, None if there is none."""
    marked = MARKED.search(plain(answer[max(0, answer.find("####")):]))
    return marked and number(marked[1])


def result(m: re.Match) -> Decimal | None:
    """The number that a match found, or what the sum that begins with it comes to."""
    return number((SUM.match(m.string, m.end()) or m)[1])


def marker(text: str) -> re.Match | None:
    """The first number marked by ####. Where the first is a heading, "#### 1. Eggs", and others
    follow, the first that is none.
    """
    first = MARKED.search(text)
    if first and (m := HEADING.match(text, first.start())) and m[1] == "1" and (
            others := [*MARKED.finditer(text, first.end())]):
        return next((o for o in others if not HEADING.match(text, o.start())), None)
    return first


def stated(text: str) -> Decimal | None:
    """The number that is last named as the answer, if nothing behind that may correct it."""
    text = text.lower().replace("</answer>", "\n")
    if said := STATED.match(text, max(0, text.rfind("answer"))):
        end = (SUM.match(text, said.end()) or said).end()
        if (ends := ENDING.match(text, end)) and not DOUBT.search(text, ends.end()):
            return result(said)
    return None


@of_own_turn
def any_number(text: str) -> tuple[Decimal | None, str]:
    """`read_number` of any text, at a third of the speed."""
    text = plain(text)
    if "####" in text and (mark := marker(text) or LABELLED.search(text)):
        return result(mark), "marked"
    if "\\boxed" in text and (boxed := [*BOXED.finditer(text)]):
        return result(boxed[-1]), "boxed"
    if (said := stated(text)) is not None:
        return said, "named"
    last = next((i for i in range(len(text) - 1, -1, -1) if text[i].isdecimal()), None)
    if last is None:
        return None, "no number"
    return number(NUMBER.findall(text, text.rfind("\n", 0, last) + 1)[-1]), "last number"


def read_number(text: str) -> tuple[Decimal | None, str]:
    """(value, what it was read from): the first number marked by ####, as in the official
    extraction; without one the last that is boxed; without that the one that is last named as the
    answer; else the last of all.
    """
    final = FINAL.search(text, max(0, len(text) - 30))
    if (final and final.start() == text.find("####") and "[" not in text
            and "<" not in text.replace("<<", "") and not (":" in text and NEXT.search(text))):
        return Decimal(final[1].replace(",", "")), "marked"
    return any_number(text)


# ---------------------------------------------------------------- a letter

LETTERS = "ABCDE"
# The form that is asked for, as the last word: nothing counts more.
ASKED = re.compile(r"(?:\A|\. ?|\n)\**The (?:correct |best |final )?answer is:? \**"
                   r"\(?([A-E])\)?\.?\**\s*\Z")
HOW = "named", "as a choice", "as a choice", "a letter"  # by `standing`
TEX = re.compile(r"\\(?:(boxed|fbox)\b|[A-Za-z]+|.)")
TAG = re.compile(r"</?(?:b|i|strong|em)>|[<\[](/?)(?:final_)?ans(?:wer)?[>\]]", re.I)
GLUED = re.compile("(?<=[\u3040-\u9fff\uac00-\ud7a3])(?=[A-E](?![A-Za-z]))")  # as in 选B
UNDRESSED = DASHES | UNSEEN | {ord(old): new for olds, new in (
    ('*_`"“”„«»$#{}', None), ("’‘", "'"), ("|", " "), ("。", "."), ("[【〔「『", "("),
    ("]】〕」』", ")")) for old in olds}
# A letter by itself, no part of vitamin-C, A-frame, °C, B.C., e.g. or B's. A small one, which may
# be a word, only where something ends it.
MENTION = re.compile(r"(?<![\w\-°.])(?<!\w')(?:[A-E]|[a-e](?=[).:,;!?']|\s*(?:\Z|\n|-\s)"
                     r"|\s+(?:because|since|as|is)\b))(?![\w°]|['.\-]\w)")
# What joins the letters of a row, and the verb after "A and B is wrong", which is no row.
JOINT = re.compile(r"\)?\s*(,?)\s*(and\b|or\b|nor\b|/|&|)\s*\(?")
VERB = re.compile(r"\)?\s+(?:is|was|seems|has|does|would)\b")
# What stands before a letter. CLAIM: the answer is, correct choice:. PICK: I choose, it must be.
# No other letter stands in it: what follows "the answer is C:" or "C is correct:" explains C.
# HINT: option, so, ->, which also begin "option A is wrong". AGAIN: a correction. DENIAL: not,
# rather than, ruling out.
FILLER = (r"(?:[\s(:,>'-]|\b(?:the|option|choice|letter|answer|most|likely|probably|clearly|then|"
          r"definitely|certainly|thus|therefore|so|indeed|simply|obviously|actually|correct|right|"
          r"best|one|statement|number|labell?ed|i|think|believe|it|is|be|would|must)\b)*\Z")
CLAIM = re.compile(
    r"\b(?:(?:answer|ans|option|choice|selection|solution|response|correction)\b(?:"
    r"(?:(?!\b(?:not|never|cannot|options|choices)\b|n't\b|[.!?;\n]).){0,48}?\b(?:is|be)\b|"
    r"(?:[ (](?![A-E]\b)\w+\)?){0,3}?(?:\s?[:=>]|\s-+\s)|\.\s)|"
    r"(?<!\b[A-E] is )(?:correct|right|best)(?:\s\w+){0,3}?\s?(?:\b(?:is|be)\b|:))" + FILLER, re.I)
PICK = re.compile(r"\b(?:pick(?:ed)?|choose|chose|choosing|select(?:ed)?|go(?:ing)? with|went with|"
                  rf"it is|it's|must be|would be|should be|that's|say|guess)\b{FILLER}", re.I)
HINT = re.compile(rf"(?:\b(?:option|choice|letter|answer|so|thus|therefore|hence|leaving|leaves)\b"
                  rf"|>|=){FILLER}", re.I)
AGAIN = re.compile(rf"\b(?:actually|wait|no|sorry),(?: it's)?{FILLER}", re.I)
DENIAL = re.compile(
    r"(?:\b(?:not|never|cannot|neither|nor|unlike|eliminat\w+|exclud\w+|reject\w*|than|instead of|"
    r"rul\w+ out)\b|n't\b|\b(?:wrong|incorrect|false) (?:answer|option|choice|one)\b)"
    r"(?:(?!\b(?:but|so|thus|therefore|hence|because|answer)\b).){0,25}\Z", re.I)
OPENS = re.compile(r"^[\s(>'-]*\Z", re.M)
# What follows one. PROVED: is the best answer. DENIED: is wrong, cannot. ENDED and FREE: nothing
# that would make it the article of a noun.
PROVED = re.compile(
    r"\)?(?:(?!\bnot\b|n't\b|[.;\n]).){0,40}?\s(?:is|seems|looks|must be)\s+"
    r"(?:(?:the|to|be|only|also|indeed|most|\w+ly)\s+)*"
    r"(?:correct|right|true|best|better|likely|accurate|appropriate|answer)\b", re.I)
DENIED = re.compile(
    r"\)?\s*(?:[:?-]?\s*(?:wrong|incorrect|false|no)\b|(?:is|are|was|can|could|does|do|would|has|seems?"
    r"|looks?|must|may|be)\b(?:\s+\w+){0,2}?\s+(?:not|wrong|incorrect|false|eliminated|excluded|"
    r"unlikely|irrelevant|ruled)\b|(?:cannot|\w+n't)\b)", re.I)
ALONE = re.compile(r"[)'.:!]*[ \t]*(?:\n|\Z)")
ENDED = re.compile(r"[)'>]*(?:[.,;:!?)]|\s*(?:\Z|\n|-|\((?:all|both|none)\b)"
                   r"|\s+(?:because|since|as|for sure|it is)\b)", re.I)
FREE = re.compile(rf"{ENDED.pattern}|[)'>]*\s+(?:and|but|is|was|seems|looks|would|can|does|has|"
                  r"makes|fits|works|matches|remains)\b", re.I)

SENTENCE = re.compile(r"[^.\n]*")
SAID = re.compile(r"\b(?:answer|choice|option)(?:\s+is|\s*:|)\s*([^\n]+)", re.I)


@of_own_turn
def read_letter(text: str, texts: list[str]) -> tuple[int | None, str]:
    """(index of the choice, what it was read from): the last of the letters that are named most
    plainly. `texts` are the choices'; letters beyond them are none.

    Every letter is treated alike: what is asked of A and a, which are words too, is asked of all.
    """
    if (asked := ASKED.search(text, max(0, len(text) - 50))) and asked[1] in LETTERS[:len(texts)]:
        return LETTERS.index(asked[1]), HOW[0]
    text = undressed(text)
    best, chosen = len(HOW), None
    for start in dict.fromkeys((max(text.rfind(s, 0, -2) for s in (". ", ".\n")) + 1, 0)):
        if best > 0:  # mostly the last sentence names it, and nothing counts more
            for m in reversed(mentions(text, LETTERS[:len(texts)], start)[-200:]):
                if (rank := standing(text, m, texts)) is not None and rank < best:
                    best, chosen = rank, m
                if best == 0:
                    break
    if best >= 3:
        index = choice_of((SAID.findall(text) or [text])[-1], texts)
        if index is not None:
            return index, "choice text"
    return (LETTERS.index(chosen[0].upper()), HOW[best]) if chosen else (None, "no letter")


def undressed(text: str) -> str:
    """The text without markup. A box or tag that marks the answer says "answer:" instead."""
    if not text.isascii():
        text = GLUED.sub(" ", unicodedata.normalize("NFKC", text))
    if "\\" in text:
        text = TEX.sub(lambda m: " answer: " if m[1] else " ", text)
    if "</" in text or "[/" in text:
        text = TAG.sub(lambda m: {None: "", "": " answer: ", "/": "\n"}[m[1]], text)
    return text.translate(UNDRESSED)


def mentions(text: str, letters: str, start: int) -> list[re.Match]:
    """The letters that stand alone, without rows such as "A, B or C", which name no single one."""
    rows = []  # [the letters, whether "or" or the like joins them]
    for m in MENTION.finditer(text, start):
        if m[0].upper() not in letters:
            continue
        joint = rows and JOINT.fullmatch(text, rows[-1][0][-1].end(), m.start())
        if joint and any(joint.groups()) and m[0] not in [n[0] for n in rows[-1][0][:5]] and not (
                joint[2] == "and" and VERB.match(text, m.end())):
            rows[-1][0].append(m)
            rows[-1][1] += joint[2]
        else:
            rows.append([[m], ""])
    return [m for row, word in rows if not word and (len(row) < 2 or len(row) < 3 and not (
        ALONE.match(text, row[1].end())  # "answer: A, B" gives two
        and CLAIM.search(text, max(0, row[0].start() - 80), row[0].start()))) for m in row]


def standing(text: str, m: re.Match, texts: list[str]) -> int | None:
    """How plainly a letter is named as the answer, an index of HOW; None if it is not."""
    start, end = m.span()
    near = max(0, start - 80)
    clause = max(text.rfind(mark, near, start) for mark in ".;:,\n") + 1
    if DENIED.match(text, end) or DENIAL.search(text, max(near, clause), start):
        return None
    if CLAIM.search(text, near, start):
        if text[end:end + 1] == " ":  # not in "Answer: A magnet", where that is another choice
            said = choice_of(SENTENCE.match(text, start)[0], texts)
            return 0 if said in (None, LETTERS.index(m[0].upper())) else None
        return 0
    if PROVED.match(text, end) or ENDED.match(text, end) and AGAIN.search(text, near, start):
        return 0
    opens = OPENS.search(text, max(0, start - 9), start)
    if opens and ALONE.match(text, end):
        return 1
    if text[start - 1:start] == "(" and text.startswith(")", end) or PICK.search(text, near, start):
        return 2
    if ENDED.match(text, end) and (opens or HINT.search(text, near, start)):
        return 2
    free = m[0].isupper() and FREE.match(text, end) and not text[near:start].rstrip()[-1:].isdigit()
    return 3 if free else None


def choice_of(said: str, texts: list[str]) -> int | None:
    """The one choice whose text, with or without its letter, is what is said."""
    found = words(said[:1000])
    hits = [i for i, t in enumerate(texts) if words(t) == found]
    return hits[0] if found and len(hits) == 1 else None


def words(text: str) -> list[str]:
    """The words in small letters, without an article or a choice's letter in front."""
    found = re.findall(r"\w+", text.lower())
    return found[1:] if found and found[0] in {"an", "the", *LETTERS.lower()} else found


# ---------------------------------------------------------------- a program

FENCE = re.compile(r"([ \t]*)(.*?)((?<!`)`{3,}(?!`)|(?<!~)~{3,}(?!~))[ \t]*([^`]*)\Z", re.S)
LANGUAGE = re.compile(r"[\w{][\w{}.+#=-]*")
CONSOLE = re.compile(r"^(?:>>>|\.\.\.)(?: (.*)|)$", re.M)
UNINDENTED = re.compile(r"^\S", re.M)
AROUND = re.compile(r"^> ?|</?(?:pre|code)\b[^>]*>", re.M)  # a quote's signs, HTML's tags
INDENT = re.compile(r"^(?: {4}|\t)", re.M)
TOP = re.compile(r"^(?:async |def |class )", re.M)
WRONG = re.compile(r"\s*#\W*(?:wrong|incorrect|buggy|bad|avoid|don't|do not)\b", re.I)
RETURNS = re.compile(r"^[ \t]*(?:return|yield|raise)\b.*\n?", re.M)
# Where a statement can begin.
STATEMENT = re.compile(r"^(?=[^\s#)\]}])(?!(?:else|elif|except|finally)\b)", re.M)
CODE = re.compile(r"[=:]|\bimport\b")  # in every statement that is kept
FUNCTION = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
DEFINITION = *FUNCTION, ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign


def read_program(prompt: str, entry_point: str, text: str) -> str:
    """The program that the text means as an answer to one of HumanEval's prompts.

    It is the last fenced block that defines `entry_point`, behind what the prompt has before that;
    else such code between prose; else a body, which continues the prompt. What it uses of other
    blocks' definitions comes along.
    """
    text = answered(text)
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    defines = definition(entry_point).search
    if entry_point in text and not defines(text):
        text = bared(text, defines)
    if text[:1].isspace() and not re.search(r"\n\S|```|~~~", text):
        return prompt + text
    head = head_of(prompt, entry_point)
    found, outside, closed = blocks(text)
    if (turn := NEXT.split(text, 1)[0]) != text and turn.strip():
        own = blocks(turn)  # without what stands behind a next question, if this is an answer
        if own[2] and any(map(defines, [own[1], *map(flush, own[0])])) or compiles(prompt + turn):
            found, outside, closed = own
    flushed = [*map(flush, found)]
    whole = [code for code in flushed if defines(code)]
    bodies = [b for b, code in zip(found, flushed)
              if (b[:1].isspace() or RETURNS.search(b)) and not defines(code)]
    if whole and not (bodies and all(hollow(code, entry_point) for code in whole)):
        code = whole[0] if len(whole) == 1 else last_draft(whole, entry_point)
        source = joined(head, code if closed or compiles(code) else statements(code))
    elif defines(outside) and not (outside.lstrip("\n")[:1].isspace()
                                   and compiles(prompt + outside)):
        source = joined(head, outside if compiles(head + outside) else statements(outside))
    elif outside.lstrip("\n")[:1].isspace():
        source = continued(prompt, outside)
    elif bodies:
        sources = [continued(prompt, body) for body in reversed(bodies)]
        source = next(filter(compiles, sources), sources[0])
    elif others := [code for code in flushed if binds(code, entry_point)]:
        source = joined(head, others[-1])
    else:
        source = continued(prompt, outside)
    return joined(borrowed(source, found), source) if len(found) > 1 else source


def bared(text: str, defines) -> str:
    """The text without a quote's signs, HTML's tags or the indentation that Markdown has for code,
    if it `defines` something only so.
    """
    bare = AROUND.sub("", text)
    if not ("```" in bare or "~~~" in bare or TOP.search(bare)):
        level = INDENT.sub("", bare)
        if defines(level) and (not text[:1].isspace() or compiles(level)):  # else a body's function
            return level
    return bare if defines(bare) else text


@functools.lru_cache(256)
def definition(name: str) -> re.Pattern:
    """What begins a line that defines `name`."""
    name = re.escape(name)
    return re.compile(rf"^(?:(?:async +)?def|class) +{name}\b|^{name} *(?::[^=\n]+)?=(?!=)", re.M)


def head_of(prompt: str, entry_point: str) -> str:
    """What the prompt has before the function: imports and helpers. All of it if it has none."""
    found = definition(entry_point).search(prompt)
    return prompt[:found.start()] if found else prompt


def blocks(text: str) -> tuple[list[str], str, bool]:
    """(the contents of Markdown's fenced blocks, the text outside, whether every block has an end).
    """
    if "```" not in text and "~~~" not in text:
        return [], text, True
    lines, begin = text.rstrip().split("\n"), 0
    outside, found, stack = [], [], []  # the stack: (fence, its indentation, the block's lines)
    for i in [i for i, s in enumerate(lines) if "```" in s or "~~~" in s] + [len(lines)]:
        fence, n, block = stack[-1] if stack else ("", 0, outside)
        block += (line[:n].lstrip() + line[n:] for line in lines[begin:i]) if n else lines[begin:i]
        begin = i
        if not (m := i < len(lines) and FENCE.match(lines[i])):
            continue
        indent, before, mark, info = m.groups()
        if not stack:
            opens = not before or "```" not in before and LANGUAGE.fullmatch(info)
        elif before or len(indent) >= n + 4:
            opens = False
        else:
            ends, opens = mark.startswith(fence), LANGUAGE.match(info)
            if ends and (opens or not info):  # an opening ends a block that was left open
                stack.pop()
                begin = i + 1
        if opens:
            outside.append(before)
            found.append([])
            stack.append((mark, len(indent), found[-1]))
            begin = i + 1
    if stack and block:
        block[-1] = block[-1].rstrip("`~ ")  # an end that stands behind the last line's code
    return ["\n".join(block) for block in found], "\n".join(outside), not stack


def flush(code: str) -> str:
    """A block without the indentation of all its lines, or a console's prompts, if it is Python so.
    """
    if code.startswith(">>>"):
        return "\n".join(m[1] or "" for m in CONSOLE.finditer(code))
    if code.lstrip("\n")[:1].isspace() and compiles(level := textwrap.dedent(code)):
        return level
    return code


def last_draft(drafts: list[str], name: str) -> str:
    """The last of several that is Python and more than the function's head and docstring, without
    those that are shown as wrong or give the name to what a call returns, as a test may.
    """
    proper = re.compile(rf"{definition(name).pattern}(?! *[\w.]+\()", re.M).search
    drafts = [code for code in drafts if proper(code) and not WRONG.match(code)] or drafts
    return next((code for code in reversed(drafts) if tree(code) and not hollow(code, name)),
                drafts[-1])


def hollow(code: str, name: str) -> bool:
    """Whether a block has the function's head, but no body yet."""
    t = tree(code) or tree(code.rstrip() + "\n    pass")
    bodies = [f.body for f in t.body if isinstance(f, FUNCTION) and f.name == name] if t else ()
    return bool(bodies) and all(
        isinstance(s, (ast.Pass, ast.Raise, ast.Import, ast.ImportFrom))
        or isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant) for s in bodies[-1])


def joined(head: str, code: str) -> str:
    """`head` in front of `code`, but behind its imports from __future__, which must come first."""
    last = 0
    if "__future__" in code and (t := tree(code)):
        last = max((s.end_lineno for s in t.body
                    if isinstance(s, ast.ImportFrom) and s.module == "__future__"), default=0)
    lines = code.split("\n") if last else [code]
    return "".join(line + "\n" for line in lines[:last]) + head + "\n".join(lines[last:])


def continued(prompt: str, body: str) -> str:
    """The prompt continued: prose behind the body left out, indentation that was stripped put back.
    """
    source = prompt + body
    if not (unindented := UNINDENTED.search(body)) or compiles(source):
        return source
    if (lead := body[:unindented.start()]).strip():
        return prompt + lead + statements(body[unindented.start():])
    ends = [len(body), *(m.end() for m in [*RETURNS.finditer(body)][-1:])]
    for part in (body[:end] for end in ends if len(ends) > 1):
        indented = re.search(r"^[ \t]+\S", part, re.M)
        for mended in (textwrap.indent(part, "    "), "    " + part.lstrip(),
                       part[indented.start():] if indented else ""):
            if mended and not UNINDENTED.search(mended) and compiles(prompt + mended):
                return prompt + mended
    return source


def statements(text: str) -> str:
    """The unindented statements in a text, with what is indented below them; no prose, no calls."""
    kept, pending = [], ""
    for chunk in STATEMENT.split(text):
        pending += chunk
        if chunk.startswith("@"):
            continue
        if CODE.search(pending) and (t := tree(pending)) and not any(
                isinstance(s, (ast.Expr, ast.Assert))
                or isinstance(s, ast.AnnAssign) and s.value is None for s in t.body):
            kept.append(pending)
        pending = ""
    return "".join(kept)


def borrowed(source: str, found: list[str]) -> str:
    """The definitions in blocks of the names that `source` uses and has not."""
    if not (t := tree(source)):
        return ""
    others, by_name, taken = [], {}, set()  # others: (statement, its lines)
    for code in map(flush, found):
        lines, block = code.split("\n"), tree(code)
        for s in block.body if block else ():
            if isinstance(s, DEFINITION):
                first = min([s.lineno, *(d.lineno for d in getattr(s, "decorator_list", ()))])
                others.append((s, "\n".join(lines[first - 1:s.end_lineno]) + "\n"))
                for name in {s.name} if isinstance(s, FUNCTION) else bound(s):
                    by_name.setdefault(name, []).append(s)
    wanted = [*(used(t) - bound(t) - set(dir(builtins)))]
    wanted += ["*"] if wanted else []
    while wanted:
        for s in by_name.pop(wanted.pop(), ()):
            taken.add(s)
            wanted += used(s)
    return "".join(text for s, text in others if s in taken)


def binds(code: str, name: str) -> bool:
    """Whether a module has the name after it ran, also by an import or an assignment to several."""
    t = tree(code) if name in code else None
    return bool(t) and any(name in ({s.name} if isinstance(s, FUNCTION) else bound(s))
                           for s in t.body)


def used(node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
            and isinstance(n.ctx, ast.Load)}


def bound(node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
            and not isinstance(n.ctx, ast.Load)} | {
        n.asname or n.name.split(".")[0] if isinstance(n, ast.alias) else
        n.arg if isinstance(n, ast.arg) else n.name
        for n in ast.walk(node) if isinstance(n, (*FUNCTION, ast.alias, ast.arg))}


def tree(source: str) -> ast.Module | None:
    """The syntax tree, or None where Python cannot read the source."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@functools.lru_cache(4)
def compiles(source: str) -> bool:
    """Whether a source is a module. "Done", "[DONE]" and "Note: x" are, but taken for prose."""
    if not (t := tree(source)) or any(
            isinstance(s, ast.Expr) and isinstance(s.value, (ast.Name, ast.List)) or
            isinstance(s, ast.AnnAssign) and s.value is None for s in t.body):
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(compile(t, "<answer>", "exec"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
