"""The pieces of `composed_modules`: code that people write around the product of an input and a weight.

In these lines of Python, `BODY` stands for the lines that set `y` to a product of `x`, and `WEIGHT` for the weight as
(O, I).
"""

from dataclasses import dataclass

ARGUMENTS = {
    "none": ("x", ""),
    "mask": ("x, mask=None", "if mask is not None:\n    x = x * mask"),
    "number": ("x, scale=1.0", "x = scale * x"),
}
"""The arguments of the model's forward, and the lines that use the second."""

INPUTS = {
    "none": ("", ""),
    "in place on a clone": ("", "x = x.clone()\nx.mul_(2)"),
    "last positions": ("", "x = x[:, -3:]"),
    "position table": ("self.register_buffer('table', torch.randn(9, 12))", "x = x + self.table[: x.shape[1]]"),
    "learnt token": (
        "self.token = nn.Parameter(torch.randn(1, 1, 12))",
        "x = torch.cat([self.token.expand(x.size(0), -1, -1), x], 1)",
    ),
    "pairs of positions": (
        "",
        "x = F.pad(x, (0, 0, 0, x.size(1) % 2))\nb, s, _ = x.shape\nx = x.contiguous().view(b, s // 2, 2, -1).mean(2)",
    ),
    "view if even": (
        "",
        "b, s, _ = x.shape\nif s % 2 == 0:\n    x = x.contiguous().view(b, s // 2, 2, -1).flip(2).flatten(1, 2)",
    ),
    "every second position": ("", "x = x[:, ::2]"),
    "halves exchanged": ("", "x = torch.cat(x.chunk(2, 1)[::-1], 1)"),
    "rolled": ("", "x = x.roll(1, 1)"),
    "first position written": ("", "x = x.clone()\nx[:, 0] = 0"),
    "causal mean": ("", "s = x.size(1)\nx = torch.tril(torch.ones(s, s, dtype=x.dtype)) @ x / s"),
    "a number of the length": ("", "x = x * int(x.size(1) * 0.5 + 1) / x.size(1) ** 0.5"),
    "if as many positions as inputs": ("", "if x.size(0) == x.size(1):\n    x = -x"),
    "batch norm": ("self.norm = nn.BatchNorm1d(12)", "x = self.norm(x.mT).mT"),
}
"""Lines of a block's `__init__`, and lines that change its input before the product."""

CONTROLS = {
    "none": "BODY",
    "if on a flag": "if self.flag:\n    BODY\nelse:\n    BODY\n    y = -y",
    "if on the shape": "if x.size(1) > 4:\n    BODY\nelse:\n    BODY\n    y = -y",
    "if on the batch": "if x.size(0) > 1:\n    BODY\nelse:\n    BODY\n    y = -y",
    "if on the data": "if x[0, 0, :5].sum() > 0:\n    BODY\nelse:\n    BODY\n    y = -y",
    "if on the mode": "if self.training:\n    BODY\nelse:\n    BODY\n    y = -y",
    "early return": "if x.size(1) < 4:\n    BODY\n    return y\nBODY\ny = 2 * y",
    "loop over constants": "total = 0\nfor scale in (0.5, 1.5):\n    BODY\n    total = total + scale * y\ny = total",
    "loop over the input": (
        "parts = []\nfor x in x.split(2, 1):\n    BODY\n    parts.append(y)\ny = torch.cat(parts, 1)"
    ),
    "while": "step = 0\nwhile step < x.size(1):\n    BODY\n    x = 0.5 * x\n    step += 2",
    "except": "try:\n    y = self.absent(x)\nexcept AttributeError:\n    BODY",
    "except of a product": "try:\n    y = F.linear(x[..., 1:], WEIGHT)\nexcept RuntimeError:\n    BODY",
    "raise and finally": (
        "scale = 1\ntry:\n    BODY\n    raise ValueError\nexcept ValueError:\n    scale = 2\n"
        "finally:\n    y = scale * y"
    ),
    "inner function": "def multiply(x):\n    BODY\n    return y\n\ny = multiply(x) + torch.sigmoid(multiply(-x))",
    "checkpoint": "def multiply(x):\n    BODY\n    return y\n\ny = checkpoint(multiply, x, use_reentrant=False)",
}

STATES = {
    "none": ("", ""),
    "counter": ("self.calls = 0", "self.calls += 1\ny = y * (1 + self.calls % 2)"),
    "buffer in place": (
        "self.register_buffer('steps', torch.zeros(()))",
        "self.steps.add_(1)\ny = y + self.steps",
    ),
    "buffer reassigned": (
        "self.register_buffer('mean', torch.zeros(()))",
        "self.mean = 0.9 * self.mean + 0.1 * y.detach().mean()\ny = y - self.mean",
    ),
    "buffer counted": (
        "self.register_buffer('n', torch.zeros((), dtype=torch.long))",
        "self.n = self.n + 1\ny = y * (1 + self.n % 2)",
    ),
    "attribute": ("self.last = None", "self.last = y.detach()\ny = y + self.last.mean()"),
    "cache in a list": ("self.cache = []", "self.cache.append(y.detach())\ny = y + self.cache[0].mean()"),
    "cache in a dict": (
        "self.memo = {}",
        "y = y + self.memo.get(x.size(1), 0)\nself.memo[x.size(1)] = y.detach().mean()",
    ),
    "random": ("", "if random.random() < 0.5:\n    y = 2 * y"),
    "torch's random": ("", "y = y * torch.rand(y.shape, dtype=torch.float32)"),
}
"""Lines of `__init__`, and lines after the product. Random numbers are float32, so that float64 draws the same."""

REGIONS = {
    "none": "BODY",
    "no_grad": "with torch.no_grad():\n    BODY",
    "autocast off": "x = x.to(self.weight.dtype)\nwith torch.autocast(x.device.type, enabled=False):\n    BODY",
    "inference_mode": "with torch.inference_mode():\n    BODY\ny = y.clone()",
}

READERS = {
    "own forward": ("", "self.weight", ""),
    "getattr": ("", "getattr(self, 'weight')", ""),
    "property": ("", "self.matrix", "@property\ndef matrix(self):\n    return self.weight\n"),
    "another method": ("", "self.weight", ""),
    "helper": ("", "weight_of(self)", ""),
    "get_parameter": ("", "self.get_parameter('weight')", ""),
    "parameters": ("", "next(self.parameters(recurse=False))", ""),
    "own list": ("self.held = [self.weight]", "self.held[0]", ""),
}
"""Lines of `__init__`, the expression with which a block reads its weight, and further lines of its class."""

PARENTS = {
    "calls": ("self.child = {child}", "return self.child(x)"),
    "calls forward": ("self.child = {child}", "return self.child.forward(x)"),
    "calls the class": ("self.child = {child}", "return type(self.child).forward(self.child, x)"),
    "calls another method": ("self.child = {projector}", "return self.child.project(x)"),
    "reads": ("self.child = {child}", "return F.linear(x, self.child.weight)"),
    "reads transposed": ("self.child = {child}", "return x @ self.child.weight.t() + self.child.bias"),
    "reads and calls": ("self.child = {child}", "return self.child(x) + F.linear(x, self.child.weight)"),
    "reads by getattr": ("self.child = {child}", "return F.linear(x, getattr(self.child, 'weight'))"),
    "gives to a helper": ("self.child = {child}", "return through(self.child, x)"),
    "loop over children": (
        "self.first = {child}\nself.second = nn.Linear(12, 12)",
        "for child in self.children():\n    x = torch.tanh(F.linear(x, child.weight))\nreturn x",
    ),
    "loop over a list": (
        "self.layers = nn.ModuleList([{child}, nn.Linear(12, 12)])",
        "for layer in self.layers:\n    x = torch.tanh(x @ layer.weight.T + layer.bias)\nreturn x",
    ),
    "calls twice": ("self.child = {child}", "return self.child(torch.tanh(self.child(x)))"),
    "one module, two names": (
        "self.first = {child}\nself.second = self.first",
        "return self.second(torch.tanh(self.first(x)))",
    ),
    "one parameter, two modules": (
        "self.first = {child}\nself.second = nn.Linear(12, 12)\nself.second.weight = self.first.weight",
        "return self.second(torch.tanh(self.first(x)))",
    ),
    "list beside the attribute": (
        "self.child = {child}\nself.held = [self.child.weight]",
        "return F.linear(torch.tanh(self.child(x)), self.held[0])",
    ),
    "one parameter, own name": (
        "self.child = {child}\nself.matrix = self.child.weight",
        "return F.linear(torch.tanh(self.child(x)), self.matrix)",
    ),
}
"""Lines of `__init__` that create the children, and lines of the forward."""

FLIPS = (".t()", ".T", ".mT", ".transpose(0, 1)", ".transpose(-2, -1)", ".permute(1, 0)")
"""Views that swap the two axes of a weight."""

VIEWS = {
    "contiguous": "w.contiguous()",
    "clone": "w.clone()",
    "to": "w.to(x.dtype)",
    "float": "w.float()",
    "reshape": "w.reshape({rows}, {columns})",
    "unflatten and flatten": "w.unflatten(0, (2, -1)).flatten(0, 1)",
    "unsqueeze and squeeze": "w.unsqueeze(0).squeeze(0)",
    "all rows": "w[:]",
}
"""Views and copies that keep a weight's shape."""

PRODUCTS = {
    "linear": ("oi", "F.linear({x}, {w})"),
    "linear with bias": ("oi", "F.linear({x}, {w}, {b})"),
    "linear by keywords": ("oi", "F.linear(input={x}, weight={w}, bias={b})"),
    "@": ("io", "{x} @ {w}"),
    "matmul": ("io", "torch.matmul({x}, {w}) + {b}"),
    "matmul of the tensor": ("io", "{x}.matmul({w})"),
    "@ from the left": ("oi", "({w} @ {x}.mT).mT"),
    "mm": ("io", "torch.mm({x}.flatten(0, 1), {w}).unflatten(0, {x}.shape[:2])"),
    "mm from the left": ("oi", "torch.mm({w}, {x}.flatten(0, 1).t()).t().unflatten(0, {x}.shape[:2])"),
    "addmm": ("io", "torch.addmm({b}, {x}.flatten(0, 1), {w}).unflatten(0, {x}.shape[:2])"),
    "bmm": ("io", "torch.bmm({x}, {w}.unsqueeze(0).expand({x}.size(0), -1, -1))"),
    "bmm of rows": ("oi", "torch.bmm({x}, {w}.unsqueeze(0).expand({x}.size(0), -1, -1).transpose(1, 2))"),
    "baddbmm": ("io", "torch.baddbmm({b}, {x}, {w}.expand({x}.size(0), -1, -1))"),
    "einsum": ("oi", "torch.einsum('bsi,oi->bso', {x}, {w})"),
    "einsum, transposed": ("io", "torch.einsum('bsi,io->bso', {x}, {w})"),
    "einsum of a batch": ("io", "torch.einsum('bsi,bio->bso', {x}, {w}.expand({x}.size(0), -1, -1))"),
}
"""The orientation of the weight that is needed, (O, I) or (I, O), and the expression."""


@dataclass(frozen=True)
class Part:
    """The rows of a weight that a block multiplies by.

    `lines` set `y`; `{0}`, `{1}`, … in them are the products with `weights`, which compute `twelfths` of the features.
    `first`, `rest` and `half` index rows; `third`, `two_thirds` and `middle` are numbers of rows.
    """

    weights: tuple[str, ...]
    twelfths: tuple[int, ...]
    lines: str
    needs_rows: bool = False
    needs_square: bool = False


_THREE = "y = torch.cat([{0}, torch.tanh({1}), {2}], -1)"

PARTS = {
    "whole": Part(("w",), (12,), "y = {0}"),
    "rows and the rest": Part(("w{first}", "w{rest}"), (4, 8), "y = torch.cat([{0}, {1}], -1)"),
    "some rows": Part(("w{half}",), (6,), "y = F.pad({0}, (0, {middle}))"),
    "chunk": Part(("q", "k", "v"), (4, 4, 4), "q, k, v = w.chunk(3, {dim})\n" + _THREE),
    "split": Part(("q", "k", "v"), (4, 4, 4), "q, k, v = w.split({third}, {dim})\n" + _THREE),
    "split by sizes": Part(
        ("q", "rest"), (4, 8), "q, rest = torch.split(w, [{third}, {two_thirds}], {dim})\ny = torch.cat([{0}, {1}], -1)"
    ),
    "unbind": Part(("q", "k", "v"), (4, 4, 4), "q, k, v = w.reshape(3, {third}, -1).unbind(0)\n" + _THREE, True),
    "two products": Part(("w", "w"), (12, 12), "y = {0} + torch.sigmoid({1})"),
    "there and back": Part(
        ("w", "w.t()"), (12, 12), "entered = x\nx = torch.tanh({0})\ny = {1}\nx = entered", needs_square=True
    ),
}

FROZEN = frozenset({"state: counter", "state: cache in a list", "state: cache in a dict", "state: random"})
"""Left out of whole captures, whose graph freezes Python values: a count, a list or dict, `random.random()`."""
