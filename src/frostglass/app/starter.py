"""The plan that `frostglass init` writes."""

STARTER = """\
# A Frostglass audit. Run it:  frostglass audit plan.toml --out run
# Every key, with its meaning: plans/reference.toml in the project, or docs/plan.md.

name = "my-audit"
seed = 0

[[scenario]]                          # one or more; every combination of its defences and attacks is a cell
name = "small CNN on my photos"

[scenario.data]
source = "photos"                     # or "folder:PATH", "digits", "parquet:FILE"
size = 32                             # pixels a side, after a centre crop

[scenario.model]
name = "small_bn_cnn"                 # or mlp, lenet, resnet20, torchvision:resnet18, my_package.my_module:factory
mode = "train"                        # mode of the client's model: "train" or "eval"
# weights = "file.safetensors"        # left out: random, from the seed

[scenario.client]
batch = 4                             # images of one client
batches = 1                           # independent repetitions: other images, other draws

[[scenario.defense]]
name = "none"                         # or instahide, mixup, dp_sgd, ...: `frostglass list defenses`

[[scenario.attack]]
name = "thaw"                         # `frostglass list attacks`; any parameter of the attack goes here too
steps = 800

[threat]                              # what the attacker knows beyond the model and the update
grants = ["examples", "labels"]       # add "bn_batch" if clients send BatchNorm buffers

[report]
metrics = ["psnr", "ssim"]
show_images = false                   # true puts private images into the report
"""
