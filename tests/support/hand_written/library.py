"""Modules of torch and transformers that read their children's weights, next to targets and as targets."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from support.hand_written.case import AT_REWRITE, EITHER, Child, Own, case, matrix
from support.models import IN, OUT

AREA = "Library modules"
SEQUENCE = (2, 4, IN)


def _of(name: str, what: str, build: type[nn.Module], targets: Any, outcome: str = "correct", **options: Any) -> None:
    case(AREA, what, targets, outcome, name=name, shape=SEQUENCE, **options)(build)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(IN, OUT, batch_first=True)
        self.fc = nn.Linear(OUT, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.rnn(x)[0])


class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(IN, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(len(x), IN)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


_of("beside-lstm", "a linear after nn.LSTM", _Recurrent, "fc")
_of("lstm", "the weights of nn.LSTM", _Recurrent, "rnn.weight_ih_l0", AT_REWRITE)
_of("gru-cell", "the weights of nn.GRUCell", _Cell, "cell.weight_ih", EITHER)


@case(AREA, "an nn.ParameterList", ("ws.0", "ws.1"), AT_REWRITE)
class ListOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([matrix(IN), matrix(seed=12)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for w in self.ws:
            x = torch.tanh(F.linear(x, w))
        return x


@case(AREA, "an nn.ParameterDict", "ws.up", AT_REWRITE)
class DictOfParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterDict({"up": matrix(), "scale": nn.Parameter(torch.ones(OUT) * 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.ws["up"]) * self.ws["scale"]


@case(AREA, "nn.Bilinear", "bilinear", EITHER)
class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(IN, IN, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bilinear(x, x.tanh())


@case(AREA, "a linear whose weight is passed to `F.bilinear`", "fc", EITHER)
class BilinearByHand(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.bilinear(x, self.fc(x), self.fc.weight.T.unsqueeze(0))


class _Lambda(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@case(AREA, "nn.Sequential of lambdas around linears", ("1", "3"))
def lambdas() -> nn.Module:
    double, shift = _Lambda(lambda x: x * 2), _Lambda(lambda x: x - x.mean())
    return nn.Sequential(double, nn.Linear(IN, OUT), shift, nn.Linear(OUT, IN))


@case(AREA, "nn.Sequential of lambdas, one of which closes over a linear", "0", copies=False)
def lambda_over_a_linear() -> nn.Module:
    linear = nn.Linear(IN, IN)
    return nn.Sequential(linear, _Lambda(lambda x: F.linear(x, linear.weight) + linear(x)))


@case(
    AREA,
    "nn.ModuleDict, chosen by an argument",
    ("heads.a", "heads.b"),
    calls=(lambda model, x: model(x, "a"), lambda model, x: model(x, "b")),
)
class ChosenHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"a": nn.Linear(IN, OUT), "b": nn.Linear(IN, 6)})

    def forward(self, x: torch.Tensor, task: str) -> torch.Tensor:
        return self.heads[task](x)


@case(AREA, "nn.Embedding and nn.EmbeddingBag next to a linear", "fc")
class Embeddings(Child):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, IN)
        self.bag = nn.EmbeddingBag(9, IN)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ids = (x.detach().abs() * 3).long() % 9
        return self.fc(self.embedding(ids).mean(1) + self.bag(ids) + x)


@case(AREA, "a convolution with kernel size 1 next to a linear", "fc", shape=SEQUENCE)
class Convolution(Child):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(IN, IN, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.convolution(x.mT).mT)


@case(AREA, "nn.AdaptiveLogSoftmaxWithLoss", "softmax.head", shape=(6, IN))
class AdaptiveSoftmax(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(IN, 12, [5], div_value=2.0)

    def forward(self, x: torch.Tensor) -> Any:
        return tuple(self.softmax(x, torch.arange(6) * 2)), self.softmax.log_prob(x)


@case(AREA, "`Conv1D` of transformers, called and read", "fc")
class CalledAndRead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Conv1D(OUT, IN)
        nn.init.normal_(self.fc.weight, std=0.2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + torch.tanh(x @ self.fc.weight)


@case(AREA, "`self.fc.weight.dtype` and `.device`, as T5 reads them", "fc")
class ReadsDtype(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.to(self.fc.weight.dtype).to(self.fc.weight.device)) * self.fc.weight.shape[0]


@case(AREA, "`isinstance(self.fc.weight, nn.Parameter)`, as T5 and torchao check", "fc", EITHER)
class AsksForParameter(Child):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.fc(x)
        return out * 2 if isinstance(self.fc.weight, nn.Parameter) else out


@case(AREA, "a loss with label smoothing, returned with the product", "w")
class WithLoss(Own):
    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = F.linear(x, self.w)
        return {"loss": F.cross_entropy(logits, torch.arange(len(x)), label_smoothing=0.1), "logits": logits}
