"""How far the step of one task changes the losses of the others."""
