"""Is a demo answer right? Maths and facts by the line after ####; code by running its asserts.

Model-written code is never handed to Python: a small interpreter walks its syntax tree, knows the
few constructs that the demo's functions are made of, and stops after a bounded number of steps.
Anything else counts as wrong.
"""
import ast
import operator
import re

OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
             ast.Mod: operator.mod, ast.FloorDiv: operator.floordiv,
             ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
             ast.Gt: operator.gt, ast.GtE: operator.ge,
             ast.USub: operator.neg, ast.Not: operator.not_}
STEPS = 5_000  # of one call
SIZE, LENGTH = 10**9, 10**5  # the largest number and the longest list that may occur


class Refused(Exception):
    """The code holds something that the interpreter does not know, or takes too long."""


class Interpreter:
    def __init__(self):
        self.names, self.steps = {}, 0

    def call(self, function: ast.FunctionDef, argument):
        if len(function.args.args) != 1 or function.decorator_list:
            raise Refused
        self.names[function.args.args[0].arg] = argument
        return self.block(function.body)

    def block(self, statements):
        """Run statements; returns (value,) of a return statement, else None."""
        for s in statements:
            if (result := self.statement(s)) is not None:
                return result

    def statement(self, s):
        self.tick()
        match s:
            case ast.Expr(value=ast.Constant()) | ast.Pass():
                return None
            case ast.Expr(value=value):
                self.value(value)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                self.names[name] = self.value(value)
            case ast.AugAssign(target=ast.Name(id=name), op=op, value=value):
                self.names[name] = self.apply(op, self.names[name], self.value(value))
            case ast.Return(value=value) if value is not None:
                return (self.value(value),)
            case ast.If(test=test, body=body, orelse=orelse):
                return self.block(body if self.value(test) else orelse)
            case ast.For(target=ast.Name(id=name), iter=iterable, body=body, orelse=[]):
                for item in list(self.value(iterable)):
                    self.names[name] = item
                    if (result := self.block(body)) is not None:
                        return result
            case _:
                raise Refused
        return None

    def value(self, e):
        self.tick()
        match e:
            case ast.Constant(value=int()):
                return e.value
            case ast.Name(id=name):
                return self.names[name]
            case ast.List(elts=items):
                return [self.value(item) for item in items]
            case ast.BinOp(left=left, op=op, right=right):
                return self.apply(op, self.value(left), self.value(right))
            case ast.UnaryOp(op=op, operand=operand):
                return self.apply(op, self.value(operand))
            case ast.BoolOp(op=op, values=values):
                for v in values:
                    result = self.value(v)
                    if bool(result) == isinstance(op, ast.Or):
                        break
                return result
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                operands = [self.value(x) for x in (left, *comparators)]
                return all(self.apply(op, a, b) for op, a, b in zip(ops, operands, operands[1:]))
            case ast.Call(func=ast.Name(id="list"), args=[], keywords=[]):
                return []
            case ast.Call(func=ast.Name(id="pow"), args=[base, ast.Constant(value=2)], keywords=[]):
                base = self.value(base)
                return self.apply(ast.Mult(), base, base)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[item],
                          keywords=[]):
                self.names[name].append(self.value(item))
                return None
            case _:
                raise Refused

    def apply(self, op, *operands):
        result = OPERATORS[type(op)](*operands)
        if len(result) > LENGTH if isinstance(result, list) else abs(result) > SIZE:
            raise Refused
        return result

    def tick(self):
        self.steps += 1
        if self.steps > STEPS:
            raise Refused


def passes(source: str, asserts) -> bool:
    """Whether the first function in `source` returns what is expected.

    asserts: [(argument, result), ...]
    """
    try:
        function = ast.parse(source).body[0]
        return isinstance(function, ast.FunctionDef) and all(
            Interpreter().call(function, list(x)) == (want,) for x, want in asserts)
    except (SyntaxError, ValueError, Refused, KeyError, TypeError, AttributeError, ArithmeticError,
            IndexError, RecursionError, MemoryError):
        return False


def is_right(task: str, prompt: str, text: str, answer) -> bool:
    """answer: maths the number, facts the letter, code the asserts."""
    if task == "code":
        return passes(prompt + text, answer)
    found = re.findall(r"#### (\S+)", text)
    return bool(found) and found[-1] == str(answer)
