"""The parts of capture: what is written down, the recorder, the modes it works under, the model it works on."""
