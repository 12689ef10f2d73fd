# What R's survival package says of the tables of tests/parity/test_cox.py, as cox_*.json beside this file.
#
#   python tests/parity/test_cox.py FOLDER                  writes the tables: time, event, stratum, then covariates
#   Rscript tests/parity/r/make_cox.R FOLDER tests/parity/r
#
# Made with R 4.2.2 and survival 3.5-3.
library(survival)
library(jsonlite)

folders <- commandArgs(trailingOnly = TRUE)
transforms <- c("km", "rank", "log", "identity")

# All 17 digits: jsonlite stops at 15, so numbers are written as text and the quotation marks taken off again.
write_exact <- function(value, name) {
  digits <- function(v) {
    if (is.list(v)) lapply(v, digits)
    else if (is.matrix(v)) lapply(seq_len(nrow(v)), function(i) digits(unname(v[i, ])))
    else if (is.numeric(v)) ifelse(is.na(v), NA, sprintf("%.17g", v))
    else v
  }
  text <- toJSON(digits(value), auto_unbox = TRUE, na = "null")
  writeLines(gsub('"(-?[0-9][0-9.e+-]*)"', "\\1", text), file.path(folders[2], paste0("cox_", name, ".json")))
}

# A model, at given coefficients (no steps) or at R's own maximum.
model <- function(table, ties, time = "time", robust = FALSE, theta = 0, at = NULL) {
  covariates <- setdiff(names(table), c("time", "event", "stratum", "later"))
  terms <- covariates
  if (theta) terms <- paste0("ridge(", paste(covariates, collapse = ", "), ", theta = ", theta, ", scale = FALSE)")
  if (length(unique(table$stratum)) > 1) terms <- c(terms, "strata(stratum)")
  formula <- as.formula(paste0("Surv(", time, ", event) ~ ", paste(terms, collapse = " + ")))
  control <- coxph.control(eps = 1e-13, toler.chol = 1e-15, iter.max = if (is.null(at)) 50 else 0, timefix = FALSE)
  arguments <- list(formula, data = table, ties = ties, control = control, robust = robust, x = TRUE, y = TRUE)
  if (!is.null(at)) arguments$init <- unname(at)
  do.call(coxph, arguments) # R looks a model's call up again, so the call must hold the table itself
}

# R stops where the likelihood no longer changes, up to 1e-7 standard errors off: a few steps more, of R's score and variance.
maximum <- function(table, ties) {
  beta <- coef(model(table, ties))
  for (step in 1:4) {
    fit <- model(table, ties, at = beta)
    beta <- beta + drop(fit$var %*% colSums(residuals(fit, type = "score")))
  }
  beta
}

one <- function(table, ties, pictures) {
  beta <- maximum(table, ties)
  null <- model(table, ties)
  fit <- model(table, ties, at = beta)
  robust <- model(table, ties, robust = TRUE, at = beta)
  # Our ranks put events before those who are censored at the same time; R's are the same once these leave a little later.
  table$later <- table$time + 0.25 * (1 - table$event)
  later <- model(table, ties, time = "later", at = beta)
  possible <- if (any(table$event == 1 & table$time <= 0)) setdiff(transforms, "log") else transforms
  zph <- lapply(possible, function(t) cox.zph(if (t == "rank") later else fit, transform = t))
  names(zph) <- possible
  out <- list(
    names = names(coef(fit)), coef = unname(coef(fit)), se = unname(sqrt(diag(fit$var))),
    loglik = fit$loglik[2], loglik_null = null$loglik[1], score = unname(null$score),
    robust_se = unname(sqrt(diag(robust$var))), robust_wald = drop(beta %*% solve(robust$var, beta)),
    zph = lapply(zph, function(z) unname(z$table))
  )
  if (pictures) {
    km <- zph$km
    times <- sort(unique(km$time))
    out$residual_time <- times
    out$residual_scaled <- t(sapply(times, function(t) colMeans(km$y[km$time == t, , drop = FALSE], na.rm = TRUE)))
    out$residual_scaled[is.nan(out$residual_scaled)] <- NA
    base <- basehaz(fit, centered = FALSE)
    if (is.null(base$strata)) base$strata <- factor("0")
    base$stratum <- as.numeric(sub("stratum=", "", as.character(base$strata)))
    happened <- unique(table[table$event == 1, c("time", "stratum")])
    base <- merge(base, happened)
    base <- base[order(base$stratum, base$time), ]
    out$baseline_time <- base$time
    out$baseline_stratum <- base$stratum
    out$baseline_hazard <- base$hazard
  }
  out
}

for (name in c("rossi", "gbsg2", "flchain", "veteran", "nested", "lung", "years")) {
  table <- read.csv(file.path(folders[1], paste0(name, ".csv")), check.names = FALSE)
  pictures <- name != "flchain"
  write_exact(list(efron = one(table, "efron", pictures), breslow = one(table, "breslow", pictures)), name)
}

theta <- 20
table <- read.csv(file.path(folders[1], "rossi.csv"))
fit <- model(table, "efron", theta = theta)
# Not cox.zph: it adds the vector of penalties to every row of the information (survival 3.5-3), which is no test.
write_exact(list(
  theta = theta, coef = unname(coef(fit)), se = unname(sqrt(diag(fit$var))), df = fit$df,
  loglik = fit$loglik[2], loglik_null = fit$loglik[1], wald = unname(fit$wald.test)
), "ridge")
