"""Which method when: a tree of questions for each wing, and for the ground floor."""

from docs.outline import Ask, Other, Use, draw


def diagram(wing: str) -> str:
    return draw(TREES[wing], f"Which method of {wing} to use when")


TREES: dict[str, Ask] = {
    "solvers": Ask(
        "What do you solve over and over?",
        (
            (
                "Sparse symmetric systems that change little from one to the next",
                Ask(
                    "Does a relaxation parameter matter?",
                    (
                        ("Yes, and one number tells the systems apart", Use("learning-to-relax", "ChebCB")),
                        ("Yes, and nothing tells them apart", Use("learning-to-relax", "TsallisINF")),
                        ("No, or a multigrid hierarchy pays", Other("pyamg, SciPy cg")),
                    ),
                ),
            ),
            (
                "Pressure systems on grids with obstacles",
                Ask(
                    "What is dear, an iteration or a second?",
                    (
                        (
                            "Iterations: each costs communication, or a GPU is at hand",
                            Use("deep-conjugate-direction", "PressureSolver"),
                        ),
                        ("Seconds on a CPU", Other("pyamg, SciPy cg with IC(0)")),
                    ),
                ),
            ),
            ("A stationary state on graphs, learnt from examples", Use("convergent-graph-solver", "CGSRegressor")),
            ("A contracting map of your own", Use("convergent-graph-solver", "FixedPointSolver")),
        ),
    ),
    "optimize": Ask(
        "What is in the way?",
        (
            (
                "Nonlinear equality constraints",
                Ask(
                    "Can the KKT matrix be factorised?",
                    (
                        ("No, or only rows and products are at hand", Use("adasketch-newton", "minimize_adasketch")),
                        ("Yes, and the problem is small and dense", Other("SciPy SLSQP, trust-constr")),
                    ),
                ),
            ),
            (
                "No smoothness constant is known",
                Ask(
                    "Is a positive semidefinite curvature matrix at hand?",
                    (
                        ("Yes: Gauss-Newton, Fisher, Hessian", Use("gradient-normalized-smoothness", "gns_minimize")),
                        (
                            "A table with labels, to be fitted",
                            Use("gradient-normalized-smoothness", "GNSLogisticRegression"),
                        ),
                        ("No, and the problem is small and smooth", Other("SciPy L-BFGS-B")),
                    ),
                ),
            ),
            (
                "The learning rate of a network",
                Ask(
                    "What is wanted?",
                    (
                        ("The largest rate for a batch size", Use("batch-learning-rates", "BatchCurvature")),
                        ("A rate and momentum set while training", Use("batch-learning-rates", "CurvatureTuner")),
                    ),
                ),
            ),
        ),
    ),
    "equilibrium": Ask(
        "Does the play exist yet?",
        (
            (
                "It is about to be run: will it converge?",
                Ask(
                    "What is known of the game?",
                    (
                        ("Curvatures, couplings, or the game itself", Use("small-gain-nash", "SmallGainCertifier")),
                        ("Policies on probability simplices", Use("small-gain-nash", "certify_mirror")),
                        ("It is zero-sum and rotates", Other("Rosen's test: euclidean_margin")),
                    ),
                ),
            ),
            (
                "An equilibrium or a zero of an operator is wanted",
                Ask(
                    "Is the operator an average of many parts?",
                    (
                        ("Many parts, the residual of the last iterate counts", Use("halpern", "vr_halpern")),
                        ("Monotone, not cocoercive", Use("halpern", "InexactHalpern")),
                        ("A matrix game of a few hundred strategies", Other("SciPy linprog")),
                        ("Few parts, or very unequal ones", Use("halpern", "AnchoredExtragradient")),
                    ),
                ),
            ),
        ),
    ),
    "privacy": Ask(
        "Whom do the people in the data trust?",
        (
            (
                "Nobody: records are randomised on their devices",
                Ask(
                    "What else is there?",
                    (
                        ("Covariates without labels are public", Use("ldp-sparse-regression", "PublicFeatureProtocol")),
                        ("Users can be asked in rounds", Use("ldp-sparse-regression", "GradientProtocol")),
                        (
                            "One round, and users beyond the cube of the dimension",
                            Use("ldp-sparse-regression", "MomentProtocol"),
                        ),
                    ),
                ),
            ),
            (
                "The curator of the table",
                Ask(
                    "Where is the difficulty?",
                    (
                        (
                            "Noise, on a long way to a stationary point",
                            Use("dp-stationary-points", "PrivateSpiderBoost"),
                        ),
                        ("One pass over a stream of samples", Use("dp-stationary-points", "PrivateTreeSpider")),
                        ("A convex loss", Use("dp-stationary-points", "RecursiveRegularization")),
                        (
                            "A linear model of low rank in high dimension",
                            Use("dp-stationary-points", "JohnsonLindenstrauss"),
                        ),
                        ("A small table or an easy regression", Use("dp-stationary-points", "NoisyGradientDescent")),
                    ),
                ),
            ),
        ),
    ),
    "tangent": Ask(
        "What would you know of a network?",
        (
            (
                "How fast its output can change near an input",
                Ask(
                    "With proof?",
                    (
                        ("With proof", Use("local-lipschitz", "LocalLipschitz")),
                        ("That it is monotone in some inputs", Use("local-lipschitz", "monotonicity")),
                    ),
                ),
            ),
            (
                "Why it gave this answer",
                Ask(
                    "What counts as faithful?",
                    (
                        (
                            "You must choose among LIME, SHAP, gradients",
                            Use("local-function-approximation", "recommend"),
                        ),
                        ("Exact shares of pixels and biases", Use("linear-interpreters", "LinearInterpreter")),
                    ),
                ),
            ),
            ("Which features it uses, and which interact", Use("local-interaction-basis", "LocalInteractionBasis")),
            (
                "How it would train if it were wide",
                Ask(
                    "What is at hand?",
                    (
                        ("A table of a few thousand rows", Use("neural-tangent-kernel", "NTKRegressor")),
                        ("A network in torch", Use("neural-tangent-kernel", "empirical_ntk")),
                    ),
                ),
            ),
        ),
    ),
    "sequence": Ask(
        "What do you have?",
        (
            (
                "A layer to design",
                Ask(
                    "Does what it must learn in context change?",
                    (
                        ("Yes, it drifts or switches", Use("local-linear-attention", "LocalLinearAttention")),
                        ("No, one linear map for the whole context", Use("local-linear-attention", "mesa")),
                        ("It is a state to be tracked", Use("local-linear-attention", "delta_rule")),
                    ),
                ),
            ),
            (
                "A pretrained transformer",
                Ask(
                    "What is too dear?",
                    (
                        ("Memory per token at long contexts", Use("liger", "linearize")),
                        ("Its weights, and much of them must go", Use("tyr-the-pruner", "TyrPruner")),
                        ("Its weights, a little less would do", Use("tyr-the-pruner", "prune_uniform")),
                        ("Neither: contexts of a few thousand tokens", Other("keep softmax attention")),
                    ),
                ),
            ),
            (
                "A masked diffusion language model, slow to decode",
                Ask(
                    "How large is it?",
                    (
                        ("Some billions of parameters", Use("localleap", "LocalLeap")),
                        ("Small: it is sure of most positions", Use("localleap", "Threshold")),
                    ),
                ),
            ),
        ),
    ),
    "training": Ask(
        "Why not back-propagate through everything?",
        (
            (
                "Activations do not fit",
                Ask(
                    "Must gradients be exact?",
                    (
                        ("Yes, a third more time is acceptable", Other("torch.utils.checkpoint")),
                        ("No: one layer at a time", Use("auglocal", "AugLocal")),
                        ("No: blocks with any local rule", Use("momentum-auxiliary-network", "MomentumAuxiliary")),
                    ),
                ),
            ),
            (
                "The machines belong to others",
                Ask(
                    "May some of them lie?",
                    (
                        ("Yes, and there is no server", Use("monna", "MoNNA")),
                        ("To try an attack first", Use("monna", "Simulation")),
                        ("No", Other("torch DistributedDataParallel")),
                    ),
                ),
            ),
        ),
    ),
    "subspaces": Ask(
        "What are the samples?",
        (
            (
                "Unlabelled points near several curved manifolds",
                Ask(
                    "Is a training run acceptable?",
                    (
                        ("Yes", Use("manifold-linearizing", "ManifoldLinearizingClustering")),
                        ("No, the subspaces are flat already", Use("manifold-linearizing", "SparseSubspaceClustering")),
                        ("No, and blobs will do", Other("scikit-learn KMeans")),
                    ),
                ),
            ),
            (
                "Solutions of one simulation at many parameters",
                Ask(
                    "Does one basis need many modes?",
                    (
                        ("Unknown: ask the criterion first", Use("rom-net", "efficiency_criterion")),
                        ("Yes, and amplitudes or signs vary", Use("rom-net", "LocalReducedBases")),
                        ("No", Other("pyMOR pod")),
                    ),
                ),
            ),
        ),
    ),
    "causal": Ask(
        "What is uncertain?",
        (
            (
                "Whether the instrument acts on the outcome itself",
                Ask(
                    "How are the nuisances modelled?",
                    (
                        ("By parametric working models", Use("selective-ate", "MultiplyRobustIVATE")),
                        ("By learners, and you know which", Use("selective-ate", "InvalidIVATE")),
                        ("By learners, to be chosen", Use("selective-ate", "SelectiveIVATE")),
                        ("Exclusion is beyond doubt", Other("two_stage_least_squares, DoubleML")),
                    ),
                ),
            ),
            (
                "Whether a predictor survives the next intervention",
                Ask(
                    "What may the representation be?",
                    (
                        ("A subset of the covariates", Use("invariant-representations", "InvariantSubsetRegressor")),
                        (
                            "A linear map, covariates are mixtures",
                            Use("invariant-representations", "LinearInvariantRepresentation"),
                        ),
                        ("Only the training distribution matters", Other("pooled least squares")),
                    ),
                ),
            ),
        ),
    ),
    "control": Ask(
        "What kind of process?",
        (
            (
                "Episodes, losses change from one to the next",
                Ask(
                    "Is there a simulator?",
                    (
                        ("Yes", Use("adversarial-linear-mdp", "PolicyOptimizer")),
                        ("No", Use("adversarial-linear-mdp", "LinearMDPOptimizer")),
                        ("Changes are gentle, no guarantee needed", Use("adversarial-linear-mdp", "LSVIUCB")),
                    ),
                ),
            ),
            (
                "It never resets",
                Ask(
                    "Which class of hypotheses?",
                    (
                        ("Values: tables, features, kernels, mixtures, lists", Use("loop", "LOOP")),
                        ("A finite list of models", Use("loop", "MLELOOP")),
                        ("A table, and no wish to set a radius", Use("loop", "PSRL")),
                    ),
                ),
            ),
            (
                "There is a log of past episodes",
                Ask(
                    "Must near-optimality be known?",
                    (
                        ("Yes, in few new episodes", Use("ftpedel", "FTPedel")),
                        ("No, and the log covers the best policy", Use("ftpedel", "pessimistic_policy")),
                    ),
                ),
            ),
            (
                "Its model is learnt from one drifting stream",
                Ask(
                    "Is a replay buffer allowed?",
                    (
                        ("No", Use("losse-ftl", "LosseFTLRegressor")),
                        ("Yes, and the drift is slow", Use("losse-ftl", "StreamNetworks")),
                    ),
                ),
            ),
        ),
    ),
    "design": Ask(
        "A fixed table of measured sequences. What else is there?",
        (
            ("A pretrained model of such sequences", Use("bib", "BIBDesigner")),
            ("Sequences without scores, to pretrain on", Use("bib", "pretrain")),
            ("Neither, and the table is small", Use("bib", "BDIDesigner")),
            ("The oracle may be asked again", Other("CMA-ES, Bayesian optimisation")),
        ),
    ),
    "linalg": Ask(
        "What do you need of a matrix?",
        (
            (
                "The solution of A x = b",
                Ask(
                    "What is A?",
                    (
                        ("Positive definite: batches, gradients, a GPU", Use("krylov", "CG")),
                        ("Symmetric, perhaps singular", Use("krylov", "MINRES")),
                        ("Read row by row, too large for a Krylov basis", Use("sketching", "SketchAndProject")),
                        ("One small system on a CPU", Other("SciPy cg, minres")),
                    ),
                ),
            ),
            ("A smoother or a preconditioner made of sweeps", Use("relaxation", "SSORPreconditioner")),
            ("The curvature of a network, as products", Use("curvature", "GaussNewton")),
            ("A spectrum, from products alone", Use("lanczos", "spectral_measure")),
        ),
    ),
}
