"""The order of `megazh.pipeline.passes` as instructions for DeepSpeed's engine; a new schedule needs both files."""

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule

from megazh.pipeline.passes import PassType, kept_micro_batches, passes


class ExpectActivation(schedule.BufferOpInstruction):
    """Start receiving the hidden states of the next micro-batch while this one's weight gradients are computed."""


class ReceiveGradient(schedule.BufferOpInstruction):
    """Wait for the gradient of a micro-batch's hidden states."""


class WeightPass(schedule.BufferOpInstruction):
    """Compute the weight gradients of a micro-batch."""


class SplitSchedule(schedule.PipeSchedule):
    """A training step of one stage, with input and weight gradients in separate passes.

    Args:
        micro_batches: micro-batches of this step.
        stages: number of stages.
        stage: number of this stage.
        most: micro-batches of the largest step of the run, which decides the number of buffers. Default: this one's.
    """

    def __init__(self, micro_batches: int, stages: int, stage: int, most: int | None = None) -> None:
        super().__init__(micro_batches, stages, stage)
        self._most = most or micro_batches

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        """One list of instructions per pass, and one for the optimizer step."""
        first, last = self.stage_id == 0, self.stage_id == self.stages - 1
        for each in passes(self.stage_id, self.stages, self.micro_batches):
            buffer = each.micro_batch % self.num_pipe_buffers()
            found: list[schedule.PipeInstruction] = []
            if each.type is PassType.FORWARD:
                found += [] if first else [schedule.RecvActivation(buffer)]
                found += [schedule.LoadMicroBatch(buffer)] if first or last else []
                found += [schedule.ForwardPass(buffer)]
                found += [] if last else [schedule.SendActivation(buffer)]
            elif each.type is PassType.BACKWARD:
                found += [] if last else [ReceiveGradient(buffer)]
                found += [schedule.BackwardPass(buffer)]
                found += [] if first else [schedule.SendGrad(buffer)]
                # The stage before has sent the next hidden states, or is about to.
                following = each.micro_batch + self.stages - self.stage_id
                if following < self.micro_batches and not first:
                    found += [ExpectActivation(following % self.num_pipe_buffers())]
            else:
                found += [WeightPass(buffer)]
            yield found
        yield [schedule.ReduceGrads(), schedule.OptimizerStep()]  # the former sums tied gradients as well

    def num_pipe_buffers(self) -> int:
        """Number of buffers: as many as micro-batches can be between forward and weight pass at one time.

        It is the same in all steps of a run: passes are recorded once per buffer.
        """
        return kept_micro_batches(self.stage_id, self.stages, self._most)
