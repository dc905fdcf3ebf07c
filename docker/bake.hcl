# For those who have buildx: docker buildx bake --file docker/bake.hcl        (`make images` needs plain `docker build` only)
# PREFIX=registry.example/team/ TAG=0.1.0 TORCH_VARIANT=cuda docker buildx bake --file docker/bake.hcl --push
# CODE_DIGEST lets `mixtune run --runner docker` see that an image holds the code that runs outside:
# CODE_DIGEST=$(.venv/bin/python -c "from mixtune.pipelines.images import source_digest; print(source_digest())")

variable "PREFIX" { default = "" }
variable "TAG" { default = "0.1.0" }
variable "BASE_IMAGE" { default = "python:3.11-slim" }
variable "TORCH_VARIANT" { default = "cpu" }
variable "REVISION" { default = "unknown" }
variable "CODE_DIGEST" { default = "unknown" }

group "default" {
  targets = ["step"]
}

target "step" {
  name       = step
  matrix     = { step = ["plan", "prepare", "pretrain", "finetune", "mixed", "evaluate", "compare", "register", "finish"] }
  context    = "."
  dockerfile = "docker/Dockerfile"
  target     = step
  tags       = ["${PREFIX}mixtune-${step}:${TAG}"]
  args = {
    BASE_IMAGE    = BASE_IMAGE
    TORCH_VARIANT = TORCH_VARIANT
    VERSION       = TAG
    REVISION      = REVISION
    CODE_DIGEST   = CODE_DIGEST
  }
}
