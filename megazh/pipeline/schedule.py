"""The order of `passes` as instructions for DeepSpeed's engine."""

from collections.abc import Iterator

from deepspeed.runtime.pipe import schedule

from megazh.pipeline.passes import passes


class ExpectActivation(schedule.PipeInstruction):
    """Begin to receive the hidden states of the next micro-batch, while this one's weights are worked on."""


class ReceiveGradient(schedule.BufferOpInstruction):
    """Wait for the gradient of a micro-batch's hidden states."""


class WeightPass(schedule.PipeInstruction):
    """Gradients of weights of the first micro-batch that still lacks them."""


class SplitSchedule(schedule.PipeSchedule):
    """A training step of one stage."""

    def steps(self) -> Iterator[list[schedule.PipeInstruction]]:
        """One list a pass, and one for the step."""
        first, last = self.stage_id == 0, self.stage_id == self.stages - 1
        for each in passes(self.stage_id, self.stages, self.micro_batches):
            buffer = each.micro_batch % self.num_pipe_buffers()
            found: list[schedule.PipeInstruction] = []
            if each.kind == "forward":
                found += [] if first else [schedule.RecvActivation(buffer)]
                found += [schedule.LoadMicroBatch(buffer)] if first or last else []
                found += [schedule.ForwardPass(buffer)]
                found += [] if last else [schedule.SendActivation(buffer)]
            elif each.kind == "backward":
                found += [] if last else [ReceiveGradient(buffer)]
                found += [schedule.BackwardPass(buffer)]
                found += [] if first else [schedule.SendGrad(buffer)]
                # The stage before has sent them, or is about to.
                follows = each.micro_batch + self.stages - self.stage_id < self.micro_batches
                found += [ExpectActivation()] if follows and not first else []
            else:
                found += [WeightPass()]
            yield found
        yield [schedule.ReduceTiedGrads(), schedule.ReduceGrads(), schedule.OptimizerStep()]

    def num_pipe_buffers(self) -> int:
        """Micro-batches between their forward and backward pass at one time."""
        return min(self.stages - self.stage_id, self.micro_batches)
